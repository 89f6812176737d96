"""RULER's tasks for every method of a lab, and through a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fraqtl_bench.quality.cache import Fitted
from fraqtl_bench.quality.methods import BASELINE
from fraqtl_bench.quality.ruler.cells import ruler_cells
from fraqtl_bench.quality.ruler.question import Item
from fraqtl_bench.quality.ruler.replies import greedy
from fraqtl_bench.quality.ruler.tasks import ruler_items
from fraqtl_bench.quality.schema import RulerCell
from fraqtl_kernels.errors import ConfigError

if TYPE_CHECKING:
    from fraqtl_bench.quality.lab import Lab


def lab_items(lab: Lab) -> list[Item]:
    """The items that the settings ask for. Raises ConfigError if the model takes no texts of that length."""
    s, subject = lab.settings, lab.subject
    for length in s.ruler_lengths:
        if length > subject.max_length:
            raise ConfigError(f"--ruler-lengths {length}: the model takes {subject.max_length}: give shorter ones")
    return ruler_items(subject.tokenizer, s.ruler_tasks, s.ruler_lengths, s.ruler_repeats, s.seed)


def lab_reply(lab: Lab, item: Item, fitted: Fitted, key: str = "") -> str:
    """A reply from the notes, or decoded now. key: what tells apart simulations with other constants."""
    name = f"{lab.subject.name}/{key}ruler {item.name}/{fitted.method.name}"
    return str(lab.progress.get(name, lambda: greedy(lab.subject, item, fitted.layers)))


def measure_ruler(lab: Lab, items: Sequence[Item]) -> dict[str, list[RulerCell]]:
    """Cells by method."""
    lab.ticker.expect("ruler", len(items) * len(lab.methods))
    replies: dict[str, list[str]] = {fitted.method.name: [] for fitted in lab.methods}
    for item in items:
        for fitted in lab.methods:
            replies[fitted.method.name].append(lab_reply(lab, item, fitted))
            lab.ticker.tick("ruler", f"{fitted.method.name}, {item.task}")
    return {name: ruler_cells(items, said, replies.get(BASELINE)) for name, said in replies.items()}


def measure_through(
    lab: Lab, items: Sequence[Item], ask: Callable[[Item], str], fitted: Fitted, key: str
) -> tuple[list[RulerCell], list[RulerCell]]:
    """Cells of the replies that `ask` gets, and of those of the simulation; lost and gained are against the latter."""
    there, here = [], []
    for item in items:
        there.append(ask(item))
        here.append(lab_reply(lab, item, fitted, key))
        lab.ticker.tick("server", f"{fitted.method.name}, {item.task}")
    return ruler_cells(items, there, here), ruler_cells(items, here)
