"""Text to hide things in, words to hide, and the hiding."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence

from fraqtl_bench.demo_model.corpus import grammar_sentence, made_up_name

NOISE = ("The road is long.", "The sky is wide.", "A bird sings.", "Here we rest, and then we go on.")


def noise(count: int) -> list[str]:
    """`count` sentences of the same few, again and again."""
    return [NOISE[i % len(NOISE)] for i in range(count)]


def prose(rng: random.Random, count: int) -> list[str]:
    """`count` sentences that say something, each something else."""
    return [grammar_sentence(rng) for _ in range(count)]


def number(rng: random.Random) -> str:
    return str(rng.randrange(1000, 10000))


def word(rng: random.Random) -> str:
    return made_up_name(rng)


def long_id(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(draw: Callable[[], str], count: int, taken: set[str]) -> list[str]:
    """`count` different results of `draw` that are not in `taken`, which they are added to."""
    found: list[str] = []
    while len(found) < count:
        one = draw()
        if one not in taken:
            taken.add(one)
            found.append(one)
    return found


def hide(sentences: Sequence[str], hidden: Sequence[str], places: Sequence[float]) -> str:
    """The sentences with each of `hidden` at its place of 0 (before all) to 1 (behind all)."""
    at = [round(place * len(sentences)) for place in places]
    parts: list[str] = []
    for i in range(len(sentences) + 1):
        parts += [one for one, index in zip(hidden, at, strict=True) if index == i]
        parts += sentences[i : i + 1]
    return " ".join(parts)


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
