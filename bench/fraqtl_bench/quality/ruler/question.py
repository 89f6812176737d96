"""A question with its text, as large as a number of tokens allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fraqtl_bench.quality.texts import begins_with_bos, encode
from fraqtl_kernels.errors import ConfigError

PATIENCE = 8  # tokens of a reply beyond twice those of the answers


@dataclass(frozen=True)
class Question:
    """A chat that ends in a question.

    turns: what user and assistant say, one after the other; the last is the user's question. lead: how the reply
    begins, as RULER gives it to every model. answers: what should stand in the rest of the reply.
    """

    turns: tuple[str, ...]
    lead: str
    answers: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat up to the lead, which a server is to go on with."""
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate((*self.turns, self.lead))]


@dataclass(frozen=True)
class Item:
    """A question as token ids. limit: tokens that a reply may have. is_chat: whether a chat template made them."""

    task: str
    length: int
    index: int
    question: Question
    prompt: tuple[int, ...]
    limit: int
    is_chat: bool

    @property
    def name(self) -> str:
        return f"{self.task}, {self.length} tokens, {self.index}"


def prompt(tokenizer: Any, question: Question) -> tuple[int, ...]:
    """As vLLM's chat endpoint renders it with `continue_final_message`; plain lines if there is no chat template."""
    if tokenizer.chat_template:
        return tuple(
            encode(
                tokenizer,
                tokenizer.apply_chat_template(question.messages, tokenize=False, continue_final_message=True),
            )
        )
    return (*begins_with_bos(tokenizer), *encode(tokenizer, "\n".join((*question.turns, question.lead))))


def limit(tokenizer: Any, question: Question) -> int:
    return PATIENCE + 2 * len(encode(tokenizer, " " + ", ".join(question.answers)))


def largest(fits: Callable[[int], bool]) -> int:
    """The largest size that fits, where all smaller ones do too; -1 if 0 doesn't."""
    low, high = -1, 0
    while fits(high):
        low, high = high, 2 * high + 16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fit(tokenizer: Any, build: Callable[[int], Question], task: str, length: int, index: int) -> Item:
    """The largest question of build(0), build(1), .. whose prompt and reply have `length` tokens or less.

    Raises ConfigError if the smallest has more.
    """

    def item(size: int) -> Item:
        question = build(size)
        ids, is_chat = prompt(tokenizer, question), bool(tokenizer.chat_template)
        return Item(task, length, index, question, ids, limit(tokenizer, question), is_chat)

    size = largest(lambda size: _tokens(item(size)) <= length)
    if size < 0:
        raise ConfigError(f"--ruler-lengths {length}: {task} takes {_tokens(item(0))} tokens or more: give longer ones")
    return item(size)


def _tokens(item: Item) -> int:
    return len(item.prompt) + item.limit
