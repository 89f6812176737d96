"""Every task by its name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fraqtl_bench.quality.ruler.conversation import conversation
from fraqtl_bench.quality.ruler.needles import KINDS, needles
from fraqtl_bench.quality.ruler.question import Item, Question, fit
from fraqtl_bench.quality.ruler.tracking import tracking
from fraqtl_bench.quality.ruler.words import common_words, frequent_words


def builder(task: str, length: int) -> Callable[[random.Random, int], Question]:
    """Makes a question of a size, whose text grows with it; `length` tokens are how many the largest may have."""
    if task in KINDS:
        return partial(needles, KINDS[task])
    if task == "cwe":
        return partial(common_words, length)
    return {"vt": tracking, "fwe": frequent_words, "mrcr_2": conversation}[task]


def ruler_items(tokenizer: Any, tasks: Sequence[str], lengths: Sequence[int], repeats: int, seed: int) -> list[Item]:
    """`repeats` items of every task and length, each within that many tokens, its reply included."""
    return [
        fit(tokenizer, partial(_build, task, length, f"{task}-{seed}-{length}-{i}"), task, length, i)
        for length in lengths
        for task in tasks
        for i in range(repeats)
    ]


def _build(task: str, length: int, seed: str, size: int) -> Question:
    return builder(task, length)(random.Random(seed), size)
