"""RULER's variable tracking (section 3.2): which variables hold a value that was handed on from one to the next."""

from __future__ import annotations

import random
from string import ascii_uppercase

from fraqtl_bench.quality.ruler.haystack import distinct, hide, listed, noise, number
from fraqtl_bench.quality.ruler.question import Question

HOPS = 4
LETTERS = 3
EXAMPLE = 2  # sentences of noise


def tracking(rng: random.Random, size: int) -> Question:
    """A chain of variables in `size` sentences of noise, behind a short example."""
    taken: set[str] = set()
    text, lead, names = _chain(rng, EXAMPLE, taken)
    asked, own_lead, own_names = _chain(rng, size, taken)
    return Question((text, f"{lead} {listed(names)}.", asked), own_lead, tuple(own_names))


def _chain(rng: random.Random, size: int, taken: set[str]) -> tuple[str, str, list[str]]:
    """Text with question, lead, and the variables."""
    names = distinct(lambda: "".join(rng.choices(ascii_uppercase, k=LETTERS)), HOPS + 1, taken)
    [value] = distinct(lambda: number(rng), 1, taken)
    statements = [f"Set {name} to {given}." for name, given in zip(names, (value, *names[:-1]), strict=True)]
    places = sorted(rng.random() for _ in statements)
    question = f"Which {len(names)} variables are {value} in the end?"
    return f"{hide(noise(size), statements, places)}\n{question}", f"The variables that are {value} are", names
