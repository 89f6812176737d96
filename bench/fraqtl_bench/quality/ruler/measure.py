"""RULER's tasks for several methods, and through a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fraqtl_bench.quality.fitted import Fitted
from fraqtl_bench.quality.methods import BASELINE
from fraqtl_bench.quality.models import Subject
from fraqtl_bench.quality.ruler.cells import ruler_cells
from fraqtl_bench.quality.ruler.question import Item
from fraqtl_bench.quality.ruler.tasks import ruler_items
from fraqtl_bench.quality.schema import RulerCell, Settings
from fraqtl_kernels.errors import ConfigError


def items_for(subject: Subject, settings: Settings) -> list[Item]:
    """The items that the settings ask for. Raises ConfigError if the model takes no texts of that length."""
    s = settings
    for length in s.ruler_lengths:
        if length > subject.max_length:
            raise ConfigError(f"--ruler-lengths {length}: the model takes {subject.max_length}: give shorter ones")
    return ruler_items(subject.tokenizer, s.ruler_tasks, s.ruler_lengths, s.ruler_repeats, s.seed)


def measure_ruler(
    items: Sequence[Item], methods: Sequence[Fitted], reply: Callable[[Item, Fitted], str]
) -> dict[str, list[RulerCell]]:
    """Cells by method, of what `reply` gives with its cache."""
    replies: dict[str, list[str]] = {fitted.method.name: [] for fitted in methods}
    for item in items:
        for fitted in methods:
            replies[fitted.method.name].append(reply(item, fitted))
    return {name: ruler_cells(items, said, replies.get(BASELINE)) for name, said in replies.items()}


def measure_through(
    items: Sequence[Item], ask: Callable[[Item], str], simulate: Callable[[Item], str]
) -> tuple[list[RulerCell], list[RulerCell]]:
    """Cells of a server's replies, and of those of its simulation; lost and gained are against the latter."""
    there, here = [ask(item) for item in items], [simulate(item) for item in items]
    return ruler_cells(items, there, here), ruler_cells(items, here)
