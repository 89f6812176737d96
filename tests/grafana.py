"""What the Grafana dashboard asks Prometheus for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "docker/grafana/kv-memory.json").read_text())


def expressions() -> list[str]:
    """The queries of all panels."""
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def metric_names(queries: Iterable[str] | None = None) -> set[str]:
    """The metrics in these queries, else in all of the dashboard: its variables too."""
    if queries is None:
        queries = [*expressions(), *(str(variable["query"]) for variable in DASHBOARD["templating"]["list"])]
    return {name for query in queries for name in re.findall(r"\b(?:fraqtl|vllm):\w+", query)}
