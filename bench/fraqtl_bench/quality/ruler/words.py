"""RULER's aggregation (section 3.3): the most frequent words of a list and of a coded text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from string import ascii_lowercase

from fraqtl_bench.quality.ruler.haystack import distinct, listed, word
from fraqtl_bench.quality.ruler.question import Question

COMMON = 5
LONG = 4096  # tokens from which on words are repeated as often as published
REPEATS = {False: (6, 1), True: (30, 3)}  # of common and other words, by whether the text is long
EXAMPLE_REPEATS = {False: (3, 1), True: (10, 3)}

ASKED = 3
NOISE = "..."
LETTERS = 6
ALPHA = 2
ZETA = 1.6449340668482264  # the sum of 1/k^ALPHA
LEAST = 60  # words from which on the second to the fifth of the ranks have different counts


def common_words(length: int, rng: random.Random, size: int) -> Question:
    """A numbered list of COMMON frequent words and `size` others, behind a short example."""
    taken: set[str] = set()
    long = length >= LONG
    example, answer = _list(rng, COMMON, EXAMPLE_REPEATS[long], taken)
    text, own = _list(rng, size, REPEATS[long], taken)
    lead = f"The {COMMON} most frequent words are"
    return Question((example, f"{lead} {listed(answer)}.", text), lead, tuple(own))


def _list(rng: random.Random, others: int, repeats: tuple[int, int], taken: set[str]) -> tuple[str, list[str]]:
    common = distinct(lambda: word(rng), COMMON, taken)
    shuffled = random.Random(rng.random())  # as many draws for every size, so that the others stay the same
    words = common * repeats[0] + distinct(lambda: word(rng), others, taken) * repeats[1]
    shuffled.shuffle(words)
    numbered = " ".join(f"{i}. {one}" for i, one in enumerate(words, 1))
    return f"This is a list of words.\n{numbered}\nWhat are the {COMMON} most frequent words of the list?", common


def zeta_counts(total: int) -> list[int]:
    """How often the words of the ranks 1, 2, .. stand in a text of `total` words; those that don't are left out."""
    counts: list[int] = []
    while (count := int(total / ZETA / (len(counts) + 1) ** ALPHA)) > 0:
        counts.append(count)
    return counts


def frequent_words(rng: random.Random, size: int) -> Question:
    """A text of LEAST + `size` coded words whose counts fall as 1/rank²; the most frequent is noise."""
    counts = zeta_counts(LEAST + size)
    words = [NOISE, *distinct(lambda: _coded(rng), len(counts) - 1, set())]
    text = _shuffled(rng, [one for one, count in zip(words, counts, strict=True) for _ in range(count)])
    question = f"Which {ASKED} coded words are the most frequent in this text? The dots are no word."
    lead = f"The {ASKED} most frequent coded words are"
    return Question((f"{text}\n{question}",), lead, tuple(words[1 : 1 + ASKED]))


def _coded(rng: random.Random) -> str:
    return "".join(rng.choices(ascii_lowercase, k=LETTERS))


def _shuffled(rng: random.Random, words: Sequence[str]) -> str:
    return " ".join(rng.sample(words, len(words)))
