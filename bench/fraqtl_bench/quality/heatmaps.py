"""Needles found by depth and length, and RULER's tasks by method, as coloured grids for the page and as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fraqtl_bench.quality.ruler.cells import lengths_of
from fraqtl_bench.quality.schema import ModelReport, Report, Settings
from fraqtl_bench.quality.tasks import cell_name
from fraqtl_bench.reporting.figures import pyplot
from fraqtl_bench.reporting.figures import save as write_figure

ACROSS = 4  # panels side by side at most


@dataclass(frozen=True)
class Heatmap:
    """Shares of 0 to 1, a list per row; errors: their standard errors, or None where they aren't known."""

    title: str
    columns: list[str]
    rows: list[str]
    shares: list[list[float]]
    errors: list[list[float]] | None = None


def needle_maps(settings: Settings, model: ModelReport) -> list[Heatmap]:
    """For each method a row per depth and a column per length."""
    lengths, depths = settings.needle_lengths, settings.needle_depths
    return [
        Heatmap(
            title=f"needle, {row.method}",
            columns=[f"{length:,} tokens" for length in lengths],
            rows=[f"depth {depth:.0%}" for depth in depths],
            shares=[[row.needle[cell_name(length, depth)] for length in lengths] for depth in depths],
        )
        for row in model.rows
        if row.needle
    ]


def ruler_maps(model: ModelReport) -> list[Heatmap]:
    """For each length a row per method and a column per task."""
    found = {row.method: row.ruler for row in model.rows if row.ruler}
    if not found:
        return []
    maps = []
    for length in lengths_of(next(iter(found.values()))):
        cells = [[cell for cell in own if cell.length == length] for own in found.values()]
        maps.append(
            Heatmap(
                title=f"RULER, {length:,} tokens",
                columns=[cell.task for cell in cells[0]],
                rows=list(found),
                shares=[[cell.accuracy for cell in own] for own in cells],
                errors=[[cell.standard_error for cell in own] for own in cells],
            )
        )
    return maps


def save_heatmaps(report: Report, folder: Path) -> Iterator[Path]:
    """Writes `needle_depth.png` and `ruler.png`, of every model one where there are several."""
    for model in report.models:
        end = f"_{model.model}.png" if len(report.models) > 1 else ".png"
        yield from _save(needle_maps(report.settings, model), ACROSS, folder / f"needle_depth{end}")
        yield from _save(ruler_maps(model), 1, folder / f"ruler{end}")


def _save(maps: Sequence[Heatmap], across: int, path: Path) -> Iterator[Path]:
    if not maps:
        return
    plt = pyplot()
    across = min(across, len(maps))
    down = -(-len(maps) // across)
    size = (1.6 + 0.8 * len(maps[0].columns)) * across, (1.3 + 0.3 * len(maps[0].rows)) * down
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    for ax in axes.flat[len(maps) :]:
        ax.set_axis_off()
    for ax, shown in zip(axes.flat, maps, strict=False):
        ax.imshow(shown.shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        ax.set_title(shown.title, fontsize=9)
        ax.set_xticks(range(len(shown.columns)), [name.replace("_", "\n", 1) for name in shown.columns], fontsize=7)
        ax.set_yticks(range(len(shown.rows)), shown.rows, fontsize=7)
        for y, line in enumerate(shown.shares):
            for x, share in enumerate(line):
                ax.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7)
    yield write_figure(plt, figure, path)
