"""RULER's needles: which values belong to which keys, said somewhere in a text (section 3.1)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fraqtl_bench.demo_model.corpus import FACTS
from fraqtl_bench.quality.ruler.haystack import distinct, hide, listed, long_id, noise, number, prose, word
from fraqtl_bench.quality.ruler.question import Question

STATEMENT, QUESTION = FACTS["code"]


@dataclass(frozen=True)
class Needles:
    """haystack: noise, prose or needles. keys: in the text, each with `values`, and `asked` of them in the question."""

    haystack: str = "prose"
    keys: int = 1
    values: int = 1
    asked: int = 1
    key: Callable[[random.Random], str] = word
    value: Callable[[random.Random], str] = number


KINDS = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value=long_id),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(haystack="needles"),
    "niah_multikey_3": Needles(haystack="needles", key=long_id, value=long_id),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, asked=4),
}


def needles(kind: Needles, rng: random.Random, size: int) -> Question:
    """Needles in `size` sentences."""
    taken: set[str] = set()
    keys = distinct(lambda: kind.key(rng), kind.keys, taken)
    values = distinct(lambda: kind.value(rng), kind.keys * kind.values, taken)
    facts = [(key, values[i * kind.values + j]) for i, key in enumerate(keys) for j in range(kind.values)]
    places = [rng.random() for _ in facts]
    text = hide(_haystack(kind, rng, size, taken, values), [STATEMENT.format(k=k, v=v) for k, v in facts], places)
    asked = keys[: kind.asked]
    if kind.asked * kind.values == 1:
        question, lead = QUESTION.format(k=asked[0]), STATEMENT.format(k=asked[0], v="").removesuffix(" .")
    else:
        question = f"What are all the codes for {listed(asked)}?"
        lead = f"The codes for {listed(asked)} are"
    return Question((f"{text}\n{question}",), lead, tuple(v for k, v in facts if k in asked))


def _haystack(kind: Needles, rng: random.Random, size: int, taken: set[str], values: list[str]) -> list[str]:
    """Of other needles whose values may be the same as each other's, but aren't answers."""
    if kind.haystack == "noise":
        return noise(size)
    if kind.haystack == "prose":
        return prose(rng, size)
    keys = distinct(lambda: kind.key(rng), size, taken)
    return [STATEMENT.format(k=key, v=distinct(lambda: kind.value(rng), 1, {*values})[0]) for key in keys]
