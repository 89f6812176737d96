"""Prompts for the demo model: a text with codes in it and a question about one of them."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from fraqtl_bench.demo_model.corpus import FACTS, NAMES, grammar_sentence
from tests.e2e.engine import DEMO_MODEL


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(DEMO_MODEL))


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def recall_prompt(length: int, seed: int) -> tuple[list[int], str]:
    """Exactly `length` token ids that end in a question, and the answer's text."""
    rng = random.Random(seed)
    name, *others = rng.sample(NAMES, 4)
    codes = {n: str(rng.randrange(1000, 10000)) for n in (name, *others)}
    facts = [" " + FACTS["code"][0].format(k=n, v=v) for n, v in codes.items()]
    head = encode("<|bos|><|user|>")
    tail = encode("\n" + FACTS["code"][1].format(k=name) + "<|end|><|assistant|>")
    early, late = encode("".join(facts[:2])), encode("".join(facts[2:]))
    filler = length - len(head) - len(tail) - len(early) - len(late)
    if filler < 0:
        raise ValueError(f"{length} tokens are too few for a question about {len(facts)} facts")
    prose: list[int] = []
    while len(prose) < filler:
        prose += encode(" " + grammar_sentence(rng))
    prose = prose[len(prose) - filler :]  # cut at the front: a sentence may begin in its middle, not end there
    cut = filler // 2
    ids = head + prose[:cut] + early + prose[cut:] + late + tail
    return ids, FACTS["code"][0].format(k=name, v=codes[name])
