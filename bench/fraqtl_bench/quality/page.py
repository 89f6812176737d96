"""The report as one HTML file without anything from elsewhere: `page.html` with the report's data in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fraqtl_bench.quality.figures import kind
from fraqtl_bench.quality.heatmaps import needle_maps, ruler_maps
from fraqtl_bench.quality.schema import ModelReport, Report, Settings
from fraqtl_bench.reporting.page import fill


def page(report: Report) -> str:
    """The whole page."""
    return fill("fraqtl_bench.quality", _content(report))


def _content(report: Report) -> dict[str, Any]:
    return {
        "settings": report.settings.model_dump(include={"text", "window", "stride", "seed"}),
        "command": report.provenance["command"],
        "models": [_model(model, report.settings) for model in report.models],
    }


def _model(model: ModelReport, settings: Settings) -> dict[str, Any]:
    rows = [
        {
            "curve": kind(row),
            **{k: _finite(v) for k, v in row.model_dump(exclude={"flips_by_margin", "needle", "ruler"}).items()},
        }
        for row in model.rows
    ]
    about = model.model_dump(include={"model", "attention", "group", "layers", "head_size", "scored_tokens"})
    heatmaps = [asdict(found) for found in (*ruler_maps(model), *needle_maps(settings, model))]
    return {**about, "rows": rows, "heatmaps": heatmaps}


def _finite(value: Any) -> Any:
    """JSON has no infinity; the page shows it as text."""
    return "∞" if isinstance(value, float) and value == float("inf") else value
