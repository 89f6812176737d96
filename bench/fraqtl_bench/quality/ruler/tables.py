"""RULER's tasks as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fraqtl_bench.quality.ruler.cells import lengths_of, overall
from fraqtl_bench.quality.schema import ModelReport, RulerCell
from fraqtl_bench.reporting.markdown import table


def ruler_lines(model: ModelReport) -> Iterator[str]:
    """A table for each length: tasks down, methods across, the mean of the tasks last."""
    found = [(f"`{row.method}`", row.ruler) for row in model.rows if row.ruler]
    if found:
        yield "### RULER's tasks"
        yield ""
        yield (
            "Share of the answers found, with its standard error over the items. In brackets answers lost / gained "
            "against `fp16`."
        )
        yield ""
        yield from _tables(found)


def through_lines(model: ModelReport) -> Iterator[str]:
    """The same through servers, each beside the simulation of its format."""
    found = []
    for t in model.through_server:
        found += [(f"`{t.kv_format}`, server", t.ruler), (f"`{t.kv_format}`, simulation", t.simulated_ruler)]
    asked = [(name, cells) for name, cells in found if cells]
    if asked:
        yield "### RULER's tasks through a running server"
        yield ""
        yield "In brackets answers lost / gained against the simulation."
        yield ""
        yield from _tables(asked)


def _tables(columns: Sequence[tuple[str, Sequence[RulerCell]]]) -> Iterator[str]:
    for length in lengths_of(columns[0][1]):
        own = [[cell for cell in cells if cell.length == length] for _, cells in columns]
        rows = [[f"{same[0].task} ({same[0].items})", *map(_cell, same)] for same in zip(*own, strict=True)]
        rows.append(["mean of the tasks", *(f"{mean:.1%} ± {100 * error:.1f}" for mean, error in map(overall, own))])
        yield from table([f"{length:,} tokens (items)", *(name for name, _ in columns)], rows)


def _cell(cell: RulerCell) -> str:
    changed = f" ({cell.lost} / {cell.gained})" if cell.lost or cell.gained else ""
    return f"{cell.accuracy:.0%} ± {100 * cell.standard_error:.0f}{changed}"
