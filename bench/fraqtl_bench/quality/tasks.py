"""Tasks with one right answer: the last word of a passage, and a needle in a long text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fraqtl_bench.demo_model.corpus import FACTS, NAMES
from fraqtl_bench.quality.texts import begins_with_bos, encode, filler
from fraqtl_kernels.errors import ConfigError

DISTRACTORS = 4  # other codes in a needle's text


@dataclass(frozen=True)
class Item:
    """Token ids whose answer is ids[first:]. cell: what results are grouped by."""

    name: str
    cell: str
    ids: tuple[int, ...]
    first: int


def item(tokenizer: Any, name: str, cell: str, prompt: str, answer: str) -> Item:
    """`prompt` and `answer` tokenised together; the answer begins where the tokens differ from the prompt's own."""
    ids, alone = encode(tokenizer, prompt + answer), encode(tokenizer, prompt)
    same = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
    bos = begins_with_bos(tokenizer)
    bos = [] if ids[: len(bos)] == bos else bos
    return Item(name, cell, (*bos, *ids), len(bos) + min(same, len(ids) - 1))


def last_word_items(tokenizer: Any, passages: Iterable[str], count: int) -> list[Item]:
    """LAMBADA's task: the last word of each passage, given all before it."""
    items = []
    for i, passage in zip(range(count), passages, strict=False):
        prompt, _, word = passage.strip().rpartition(" ")
        if prompt:
            items.append(item(tokenizer, f"passage-{i}", "all", prompt, " " + word))
    if not items:
        raise ConfigError("no passage of two words or more was found: give one passage a line")
    return items


def generated_passages(seed: int) -> Iterator[str]:
    """Passages whose last word is only known to who remembers their beginning: a list of words, said twice."""
    rng = random.Random(f"last-word-{seed}")
    while True:
        words = rng.sample(NAMES, rng.randrange(6, 12))
        between = " ".join(filler(rng, "test") for _ in range(rng.randrange(2, 8)))
        said = " ".join(words)
        again = " ".join(words[: rng.randrange(4, len(words) + 1)])
        yield f"{said}. {between} {again}"


def needle_items(
    tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], repeats: int, seed: int
) -> list[Item]:
    """For every length and depth, `repeats` texts of that many tokens with a code at that depth, and its question."""
    items = []
    for length in lengths:
        for depth in depths:
            for i in range(repeats):
                rng = random.Random(f"needle-{seed}-{length}-{depth}-{i}")
                cell = cell_name(length, depth)
                items.append(_needle(tokenizer, rng, f"{cell}, {i}", cell, length, depth))
    return items


def cell_name(length: int, depth: float) -> str:
    return f"{length} tokens, depth {depth:.0%}"


def _needle(tokenizer: Any, rng: random.Random, name: str, cell: str, length: int, depth: float) -> Item:
    names = rng.sample(NAMES, DISTRACTORS + 1)
    codes = {k: str(rng.randrange(1000, 10000)) for k in names}
    others = [FACTS["code"][0].format(k=k, v=codes[k]) for k in names[1:]]
    asked = names[0]
    sentences = _fill(tokenizer, rng, length - len(encode(tokenizer, _prompt(tokenizer, " ".join(others), asked))) - 32)
    for other in others:
        sentences.insert(rng.randrange(len(sentences) + 1), other)
    sentences.insert(round(depth * len(sentences)), FACTS["code"][0].format(k=asked, v=codes[asked]))
    return item(tokenizer, name, cell, _prompt(tokenizer, " ".join(sentences), asked), f" {codes[asked]}")


def _fill(tokenizer: Any, rng: random.Random, room: int) -> list[str]:
    """Sentences of `room` tokens together or little less: never more, or a model's longest text would be exceeded."""
    sentences: list[str] = []
    misses = 0
    while misses < 8:
        sentence = filler(rng, "test")
        size = len(encode(tokenizer, " " + sentence))
        if size > room:
            misses += 1
            continue
        sentences.append(sentence)
        room -= size
    return sentences


def _prompt(tokenizer: Any, text: str, asked: str) -> str:
    """The text, the question, and the beginning of the answer up to the code."""
    statement, question = (part.format(k=asked, v="") for part in FACTS["code"])
    lead = statement.removesuffix(" .")
    if not tokenizer.chat_template:
        return f"{text}\n{question} {lead}"
    chat = [{"role": "user", "content": f"{text}\n{question}"}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) + lead
