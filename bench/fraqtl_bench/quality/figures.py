"""The report's figures as PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fraqtl_bench.quality.heatmaps import save_heatmaps
from fraqtl_bench.quality.schema import ModelReport, Report, Row
from fraqtl_bench.reporting.figures import pyplot
from fraqtl_bench.reporting.figures import save as write_figure

COLORS = {
    "int, per channel": "#0b6e99",
    "int, per token": "#56b4d3",
    "server formats": "#2e9e4f",
    "rank at 16 bits": "#c0392b",
    "rank at 8 bits": "#e8b004",
    "rank at 6 bits": "#d98200",
    "rank at 4 bits": "#a0522d",
    "fp16": "#7a8594",
}


def kind(row: Row) -> str:
    """The curve that a row belongs to: its method without numbers."""
    if row.family == "quantisation":
        return "int, per " + ("channel" if "channel" in row.method else "token")
    if row.family == "hybrid":
        return f"rank at {row.method.split('x')[1].split('@')[0]} bits"
    if row.family == "rival":
        return row.method
    return {"rank": "rank at 16 bits", "server": "server formats", "baseline": "fp16"}[row.family]


def curves(model: ModelReport) -> dict[str, list[Row]]:
    """Rows on both sides and in their own basis, by curve, along the bits."""
    found: dict[str, list[Row]] = {}
    for row in sorted(model.rows, key=lambda r: r.bits_per_dim):
        if row.side == "kv" and "@" not in row.method and row.perplexity is not None:
            found.setdefault(kind(row), []).append(row)
    return found


def save(report: Report, folder: Path) -> list[Path]:
    """Write every figure; returns the files."""
    return [*_bits(report, folder), *_law(report, folder), *_groups(report, folder), *save_heatmaps(report, folder)]


def _bits(report: Report, folder: Path) -> Iterator[Path]:
    plt = pyplot()
    for value, label in (
        ("perplexity", "perplexity"),
        ("flips", "routing flips"),
        ("needle_accuracy", "needle accuracy"),
    ):
        shown = [
            m for m in report.models if any(getattr(r, value) is not None for own in curves(m).values() for r in own)
        ]
        if not shown:
            continue
        figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False)
        for ax, model in zip(axes[0], shown, strict=True):
            for name, rows in curves(model).items():
                points = [(r.bits_per_dim, getattr(r, value)) for r in rows if getattr(r, value) is not None]
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", ms=4, label=name, color=COLORS.get(name))
            if value == "perplexity":
                ax.set_yscale("log")
            ax.set(title=f"{model.model} ({model.attention} {model.group}:1)", xlabel="bits per dimension, all counted")
            ax.grid(alpha=0.3)
        axes[0][0].set_ylabel(label)
        axes[0][-1].legend(fontsize=7)
        yield write_figure(plt, figure, folder / f"{value}.png")


def _law(report: Report, folder: Path) -> Iterator[Path]:
    plt = pyplot()
    shown = [m for m in report.models if m.law and m.law.points]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False)
    for ax, model in zip(axes[0], shown, strict=True):
        assert model.law is not None
        for name in dict.fromkeys(point[0] for point in model.law.points):
            own = [p for p in model.law.points if p[0] == name and p[2] > 0]
            ax.plot([p[2] for p in own], [p[3] / p[2] for p in own], ".", ms=3, alpha=0.6, label=name)
        ax.axhspan(0.75, 1.25, color="#888888", alpha=0.2)
        ax.set(xscale="log", yscale="log", xlabel="predicted KL, nats", title=model.model)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("measured / predicted")
    axes[0][-1].legend(fontsize=7)
    yield write_figure(plt, figure, folder / "law.png")


def _groups(report: Report, folder: Path) -> Iterator[Path]:
    """Margin of quantization over deletion against the query heads per KV head."""
    plt = pyplot()
    points: dict[float, list[tuple[int, float]]] = {}
    for model in report.models:
        for budget in sorted({row.budget for row in model.rows}):
            best = [r.margin for r in model.rows if r.budget == budget and r.family == "quantisation" and r.margin]
            if best:
                points.setdefault(budget, []).append((model.group, max(best)))
    if len(report.models) < 2 or not points:
        return
    figure, ax = plt.subplots(figsize=(5, 4))
    for budget, own in points.items():
        ax.plot(*zip(*sorted(own), strict=True), "o-", label=f"{budget:g} bits")
    ax.axhline(0, color="#555555", lw=0.8)
    ax.set(xlabel="query heads per KV head", ylabel="perplexity of deletion - of quantisation", yscale="symlog")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    yield write_figure(plt, figure, folder / "margin_by_group.png")
