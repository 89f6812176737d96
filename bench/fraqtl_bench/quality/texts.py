"""Texts to measure on: files, WikiText-2, LAMBADA, and text that the lab makes up, as windows of tokens.

Files are read a piece at a time, so that no more than a piece of text and a window of tokens is held. A piece
ends at the end of a line and is tokenised by itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from fraqtl_bench.demo_model.corpus import FACTS, NAMES, grammar_sentence, standard_library_prose
from fraqtl_kernels.errors import ConfigError

PIECE_CHARACTERS = 1 << 20
GENERATED = "generated"
WIKITEXT = "wikitext"
LAMBADA = "lambada"
SHINGLE = 32  # tokens
SHARED_LIMIT = 0.1


@dataclass(frozen=True)
class Window:
    """Token ids, of which those from `first` on are predicted and scored."""

    index: int
    ids: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


def pieces(source: str, split: str, seed: int, tokenizer: Any) -> Iterator[str]:
    """The text called `source`: `generated`, `wikitext`, or a file. split: `test` or `calibration`."""
    if source == GENERATED:
        return generated_documents(tokenizer, split, seed)
    if source == WIKITEXT:
        return _wikitext({"test": "test", "calibration": "validation"}[split])
    return file_pieces(Path(source))


def file_pieces(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file in pieces of about a million characters. Raises ConfigError if it isn't one."""
    if not path.is_file():
        raise ConfigError(f"text {str(path)!r} was not found: give a text file, {GENERATED!r} or {WIKITEXT!r}")
    empty = True
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while piece := "".join(file.readlines(PIECE_CHARACTERS)):
                if "\0" in piece:
                    raise ConfigError(f"text {str(path)!r} is a binary file: give a UTF-8 text file")
                empty = empty and not piece.strip()
                yield piece
        except UnicodeDecodeError:
            raise ConfigError(f"text {str(path)!r} is not UTF-8: give a UTF-8 text file") from None
    if empty:
        raise ConfigError(f"text {str(path)!r} is empty: give a UTF-8 text file with something in it")


def _wikitext(split: str) -> Iterator[str]:
    rows = _load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    yield "\n\n".join(row["text"] for row in rows)


def _load_dataset(*arguments: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError("the package `datasets` is not installed: install it or give the text as a file") from None
    try:
        return load_dataset(*arguments[:-1], split=arguments[-1])
    except Exception as error:
        raise ConfigError(f"data set {arguments[0]!r} can't be read: give the text as a file") from error


def begins_with_bos(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without anything put before or after. Markup of special tokens in the text is understood."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def windows(ids: Iterable[int], length: int, stride: int, limit: int | None, bos: Sequence[int]) -> Iterator[Window]:
    """Windows of `length` tokens, `stride` apart, so that every token of the text is scored once.

    The first window scores all of its tokens but the first, later ones their last `stride`, with length - stride
    tokens of context or more. `bos` begins every window. limit: of scored tokens. The last window may be shorter.
    """
    room = length - len(bos)
    if not 0 < stride <= length:
        raise ConfigError(f"stride {stride} is not possible with windows of {length} tokens: give 1 to {length}")
    stride = min(stride, length - 1)  # the first token of a text or window has nothing before it
    stream = iter(ids)
    held = list(islice(stream, room))
    new, index, scored = len(held), 0, 0
    while new:
        first = len(bos) + len(held) - new
        window = Window(index, (*bos, *held), max(first, 1))
        if limit is not None and scored + window.scored > limit and index:
            return
        if window.scored:
            yield window
        scored, index = scored + window.scored, index + 1
        more = list(islice(stream, stride))
        new = len(more)
        held = (held + more)[-room:]


def token_stream(tokenizer: Any, texts: Iterable[str]) -> Iterator[int]:
    for text in texts:
        yield from encode(tokenizer, text)


def shingles(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + SHINGLE]) for i in range(len(ids) - SHINGLE + 1)}


def check_apart(calibration: set[tuple[int, ...]], window: Window) -> None:
    """Raises ConfigError if more than a tenth of a window's runs of 32 tokens stand in the calibration text."""
    own = shingles(window.ids)
    shared = len(own & calibration) / max(1, len(own))
    if shared > SHARED_LIMIT:
        raise ConfigError(
            f"{shared:.0%} of window {window.index} stands in the calibration text too: calibrate on another text"
        )


@cache
def _prose(split: str) -> tuple[str, ...]:
    """Paragraphs for a split: no paragraph is in both."""
    return tuple(list(dict.fromkeys(standard_library_prose(limit_bytes=2_000_000)))[split == "test" :: 2])


def filler(rng: random.Random, split: str) -> str:
    return rng.choice(_prose(split)) if rng.random() < 0.5 else grammar_sentence(rng)


def generated_documents(tokenizer: Any, split: str, seed: int) -> Iterator[str]:
    """Endless documents: prose with facts in it, then questions about them with their answers.

    With the tokenizer's chat template if it has one, so that models see what they were trained on.
    """
    rng = random.Random(f"{split}-{seed}")
    while True:
        facts = {name: str(rng.randrange(1000, 10000)) for name in rng.sample(NAMES, rng.randrange(3, 7))}
        parts = [FACTS["code"][0].format(k=k, v=v) for k, v in facts.items()]
        parts += [filler(rng, split) for _ in range(rng.randrange(6, 20))]
        rng.shuffle(parts)
        asked = rng.sample(sorted(facts), 3)
        turns = [(FACTS["code"][1].format(k=k), FACTS["code"][0].format(k=k, v=facts[k])) for k in asked]
        yield document(tokenizer, " ".join(parts), turns)


def document(tokenizer: Any, text: str, turns: Sequence[tuple[str, str]]) -> str:
    """A text, then questions and answers about it, in the chat template's markup or as plain lines."""
    if not tokenizer.chat_template:
        return text + "\n" + "".join(f"{question} {answer}\n" for question, answer in turns) + "\n"
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": f"{text}\n{question}" if i == 0 else question})
        messages.append({"role": "assistant", "content": answer})
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def lambada_passages(source: str) -> Iterator[str]:
    """Passages of LAMBADA from a JSON-lines file with "text", a file of one passage a line, or the data set."""
    if source == LAMBADA:
        yield from (row["text"] for row in _load_dataset("EleutherAI/lambada_openai", "default", "test"))
        return
    for piece in file_pieces(Path(source)):
        for line in piece.splitlines():
            if line.strip():
                yield json.loads(line)["text"] if source.endswith((".jsonl", ".json")) else line
