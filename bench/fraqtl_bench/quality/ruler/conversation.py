"""Multi-round co-reference in the shape of MRCR: which of two replies to the same request was the first?"""

from __future__ import annotations

import random

from fraqtl_bench.demo_model.corpus import NAMES, PLACES, SUBJECTS, TIMES, VERBS
from fraqtl_bench.quality.ruler.haystack import distinct
from fraqtl_bench.quality.ruler.question import Question

KINDS = ("note", "story", "riddle", "letter")
TOPICS = 4
ORDER = ("first", "second")  # one for each needle


def conversation(rng: random.Random, size: int) -> Question:
    """A chat with two equal requests among `size` others for the same kinds of text on the same topics."""
    topics = rng.sample(NAMES, TOPICS)
    asked = (rng.choice(KINDS), rng.choice(topics))
    wanted = rng.randrange(len(ORDER))
    places = sorted(rng.random() for _ in ORDER)
    others = [(kind, topic) for kind in KINDS for topic in topics if (kind, topic) != asked]
    said: set[str] = set()
    needles = [_reply(rng, asked[1], said) for _ in ORDER]
    rounds = [(*pair, _reply(rng, pair[1], said)) for pair in (rng.choice(others) for _ in range(size))]
    for place, reply in reversed(list(zip(places, needles, strict=True))):
        rounds.insert(round(place * size), (*asked, reply))
    turns = [text for kind, topic, reply in rounds for text in (f"Write a {kind} about the {topic}.", reply)]
    which = f"the {ORDER[wanted]} {asked[0]} about the {asked[1]}"
    return Question((*turns, f"Repeat {which}."), f"This is {which}:", (needles[wanted].removesuffix("."),))


def _reply(rng: random.Random, topic: str, said: set[str]) -> str:
    def sentence() -> str:
        parts = (rng.choice(SUBJECTS), rng.choice(VERBS), f"the {topic}", rng.choice(PLACES), rng.choice(TIMES))
        text = " ".join(parts)
        return f"{text[0].upper()}{text[1:]}."

    return distinct(sentence, 1, said)[0]
