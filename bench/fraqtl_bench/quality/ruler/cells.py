"""Results by task and length."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fraqtl_bench.quality.ruler.question import Item
from fraqtl_bench.quality.ruler.replies import found
from fraqtl_bench.quality.schema import RulerCell


def ruler_cells(
    items: Sequence[Item], replies: Sequence[str], baseline: Sequence[str] | None = None
) -> list[RulerCell]:
    """A cell per task and length. baseline: replies of fp16 to the same items, to count what was lost and gained."""
    cells: dict[tuple[str, int], list[int]] = {}
    for i, item in enumerate(items):
        cells.setdefault((item.task, item.length), []).append(i)
    right = [found(item, reply) for item, reply in zip(items, replies, strict=True)]
    before = right if baseline is None else [found(i, reply) for i, reply in zip(items, baseline, strict=True)]
    return [_cell(*name, [right[i] for i in own], [before[i] for i in own]) for name, own in cells.items()]


def _cell(task: str, length: int, right: list[list[bool]], before: list[list[bool]]) -> RulerCell:
    scores = [fmean(one) for one in right]
    mean = fmean(scores)
    pairs = [(a, b) for after, first in zip(right, before, strict=True) for a, b in zip(after, first, strict=True)]
    return RulerCell(
        task=task,
        length=length,
        items=len(right),
        answers=len(pairs),
        found=sum(a for a, _ in pairs),
        accuracy=mean,
        standard_error=(fmean((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5,
        lost=sum(b and not a for a, b in pairs),
        gained=sum(a and not b for a, b in pairs),
    )


def overall(cells: Sequence[RulerCell]) -> tuple[float, float]:
    """Mean accuracy over the cells, each weighing the same, and its standard error."""
    error = sum(cell.standard_error**2 for cell in cells) ** 0.5 / len(cells)
    return fmean(cell.accuracy for cell in cells), error


def lengths_of(cells: Sequence[RulerCell]) -> list[int]:
    return list(dict.fromkeys(cell.length for cell in cells))
