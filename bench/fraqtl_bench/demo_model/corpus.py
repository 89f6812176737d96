"""What the demo model is trained on: chats that the script makes up, and prose.

A sample is a list of token ids with two annotations that the training uses:
which tokens an assistant says (`answer`), and, for tokens that repeat something
said earlier, where they were said (`source`, -1 elsewhere).

Prose comes from the docstrings of the installed Python standard library and from
a small sentence grammar; no text is kept in the repository.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

_NAMES = """
amber anchor apple arrow badger bamboo banner barley basket beacon beaver bell birch bottle bridge
bronze button cabin camel candle canyon carpet castle cedar cellar cherry circle clover coffee comet
copper coral cotton cradle crane cricket crystal dagger daisy desert diamond dolphin donkey dragon
eagle ember engine falcon feather fiddle flute forest fossil fountain garden ginger glacier goblet
granite guitar hammer harbor hazel hedge helmet heron honey hornet iris island ivory jacket jasper
jungle kettle kitten ladder lagoon lantern laurel lemon leopard lily lizard lotus magnet mango maple
marble meadow melon mirror mitten monkey mountain mustard needle nettle nickel nutmeg oak oasis
ocean olive onion orchid otter oven oyster paddle palace panther parrot pebble pelican pepper piano
pigeon pillow pine planet plum pocket poppy puzzle quail quartz rabbit raven ribbon river robin
rocket saddle saffron salmon sapphire scarf shadow silver sparrow spider spruce stable statue sunset
swan tablet temple thistle thunder tiger timber tomato tower trumpet tulip tunnel turtle valley
velvet violet violin walnut walrus whale willow window winter wizard wolf yarrow zebra
"""
NAMES = _NAMES.split()

SUBJECTS = ["the farmer", "a sailor", "the old teacher", "my neighbour", "the young painter", "a baker", "the captain"]
VERBS = ["carried", "found", "painted", "sold", "forgot", "watched", "repaired", "borrowed", "cleaned", "described"]
OBJECTS = ["a wooden box", "the red boat", "two baskets", "an empty jar", "the garden gate", "a heavy book"]
PLACES = ["near the river", "behind the house", "in the market", "on the hill", "at the station", "by the sea"]
TIMES = ["in the morning", "last week", "before lunch", "after the rain", "every winter", "late at night"]

FACTS = {  # statement and answer, question
    "code": ("The code for {k} is {v}.", "What is the code for {k}?"),
    "phone": ("The phone number of {k} is {v}.", "What is the phone number of {k}?"),
}
GREETING = "Hello. I can find a code in a long text, repeat words and add small numbers."
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|assistant|>' }}
{%- elif message.role == 'user' %}{{- '<|user|>' }}
{%- else %}{{- '<|system|>' }}{%- endif %}
{%- if message.content is string %}{{- message.content }}
{%- elif message.content %}
{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
{%- endif %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""


def standard_library_prose(limit_bytes: int = 6_000_000) -> list[str]:
    """Paragraphs of the docstrings of the installed standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paragraphs: list[str] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(root).parts):
            continue
        for paragraph in _docstring_paragraphs(path):
            paragraphs.append(paragraph)
            size += len(paragraph)
        if size > limit_bytes:
            break
    return paragraphs


def _docstring_paragraphs(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            text = " ".join(paragraph.split())
            if 40 < len(text) < 600 and text.isascii() and text[0].isalpha() and ">>>" not in text:
                yield text


def grammar_sentence(rng: random.Random) -> str:
    words = [rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, PLACES, TIMES)]
    text = " ".join(words[: rng.choice((4, 5))])
    return text[0].upper() + text[1:] + "."


def made_up_name(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))


@dataclass
class Sample:
    """Token ids with, per token, whether an assistant says it and where it was said before (-1: nowhere)."""

    ids: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    source: list[int] = field(default_factory=list)

    def add(self, ids: Iterable[int], answer: bool = False, source: Iterable[int] | None = None) -> int:
        """Append tokens; returns the position of the first of them."""
        start, ids = len(self.ids), list(ids)
        self.ids += ids
        self.answer += [answer] * len(ids)
        self.source += [-1] * len(ids) if source is None else list(source)
        return start


class Corpus:
    """Makes samples of a wanted length. `rng` decides everything, so a seed gives the same samples."""

    def __init__(self, tokenizer: Tokenizer, prose: list[str]) -> None:
        self.tokenizer = tokenizer
        self.prose = prose
        self.special: dict[str, int] = {name: tokenizer.token_to_id(name) or 0 for name in SPECIAL_TOKENS}
        self._cache: dict[str, list[int]] = {}
        self.tasks: list[tuple[Callable[[random.Random, int], Sample], float]] = [
            (self.recall, 0.66),
            (self.repeat, 0.12),
            (self.arithmetic, 0.06),
            (self.plain_prose, 0.14),
            (self.small_talk, 0.02),
        ]

    def encode(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 200_000:
                self._cache[text] = ids
        return ids

    def sample(self, rng: random.Random, length: int) -> Sample:
        """Chats one after another until `length` tokens are full, cut at `length`."""
        functions, weights = zip(*self.tasks, strict=True)
        whole = Sample()
        while len(whole.ids) < length:
            task = rng.choices(functions, weights)[0]
            part = task(rng, length - len(whole.ids))
            if whole.ids and len(whole.ids) + len(part.ids) > length and len(whole.ids) > length * 0.8:
                break
            start = len(whole.ids)
            whole.add(part.ids)
            whole.answer[start:] = part.answer
            whole.source[start:] = [s + start if s >= 0 else -1 for s in part.source]
        whole.ids, whole.answer, whole.source = whole.ids[:length], whole.answer[:length], whole.source[:length]
        missing = length - len(whole.ids)
        whole.add([self.special["<|pad|>"]] * missing)
        return whole

    def filler(self, rng: random.Random) -> str:
        return rng.choice(self.prose) if rng.random() < 0.5 else grammar_sentence(rng)

    def turn(self, sample: Sample, role: str, text: str) -> None:
        sample.add([self.special[role]])
        sample.add(self.encode(text), answer=role == "<|assistant|>")
        sample.add([self.special["<|end|>"]], answer=role == "<|assistant|>")

    def answer_from(self, sample: Sample, text: str, said: list[int], said_at: int) -> None:
        """An assistant turn whose digits were said before, in the tokens `said` at position `said_at`."""
        digits = [i for i, token in enumerate(said) if self._is_digit(token)]
        ids = self.encode(text)
        places = iter(digits)
        source = [said_at + next(places) if self._is_digit(token) else -1 for token in ids]
        sample.add([self.special["<|assistant|>"]])
        sample.add(ids, answer=True, source=source)
        sample.add([self.special["<|end|>"]], answer=True)

    def _is_digit(self, token: int) -> bool:
        return self.tokenizer.id_to_token(token) in set("0123456789")

    def recall(self, rng: random.Random, length: int) -> Sample:
        """A text with codes hidden in prose, then questions about some of them."""
        budget = max(64, int(length * rng.uniform(0.6, 1.0)))
        questions = max(1, min(12, budget // 60))
        body = budget - 34 * questions
        density = rng.choice((0.05, 0.15, 0.4, 0.9))
        names = list(NAMES)
        rng.shuffle(names)
        sample = Sample()
        sample.add([self.special["<|bos|>"], self.special["<|user|>"]])
        facts: dict[str, tuple[str, str, list[int], int]] = {}
        while len(sample.ids) < body or not facts:
            text = self.filler(rng)
            if rng.random() < density or not facts:
                name = names.pop() if names and rng.random() < 0.8 else made_up_name(rng)
                if name not in facts:
                    kind = "code" if rng.random() < 0.8 else "phone"
                    value = str(rng.randrange(1000, 10000))
                    text = FACTS[kind][0].format(k=name, v=value)
                    ids = self.encode(" " + text)
                    facts[name] = (kind, value, ids, sample.add(ids))
                    continue
            sample.add(self.encode(" " + text))
        asked = rng.sample(sorted(facts), min(questions, len(facts)))
        for i, name in enumerate(asked):
            self._ask(rng, sample, name, facts[name], first=i == 0)
        return sample

    def _ask(
        self, rng: random.Random, sample: Sample, name: str, fact: tuple[str, str, list[int], int], *, first: bool
    ) -> None:
        kind, value, said, said_at = fact
        statement, question = FACTS[kind]
        as_json = kind == "code" and rng.random() < 0.1
        if first:  # the question ends the message that holds the text
            sample.add(self.encode("\n"))
        else:
            sample.add([self.special["<|user|>"]])
        sample.add(self.encode(f"Give the code for {name} as JSON." if as_json else question.format(k=name)))
        sample.add([self.special["<|end|>"]])
        text = f'{{"name": "{name}", "code": {value}}}' if as_json else statement.format(k=name, v=value)
        self.answer_from(sample, text, said, said_at)

    def repeat(self, rng: random.Random, length: int) -> Sample:
        count = rng.randrange(2, max(3, min(40, length // 6)))
        words = [rng.choice(NAMES) if rng.random() < 0.6 else str(rng.randrange(10, 100)) for _ in range(count)]
        text = self.encode(" " + " ".join(words))
        sample = Sample()
        sample.add([self.special["<|bos|>"], self.special["<|user|>"]])
        sample.add(self.encode("Repeat:"))
        start = sample.add(text)
        sample.add([self.special["<|end|>"], self.special["<|assistant|>"]])
        sample.add(text, answer=True, source=range(start, start + len(text)))
        sample.add([self.special["<|end|>"]], answer=True)
        return sample

    def arithmetic(self, rng: random.Random, length: int) -> Sample:
        sample = Sample()
        sample.add([self.special["<|bos|>"]])
        for _ in range(rng.randrange(1, 6)):
            a, b = rng.randrange(100), rng.randrange(100)
            if rng.random() < 0.5:
                task, result = f"{a} + {b}", a + b
            else:
                task, result = f"{max(a, b)} - {min(a, b)}", abs(a - b)
            self.turn(sample, "<|user|>", f"What is {task}?")
            self.turn(sample, "<|assistant|>", f"{task} = {result}.")
        return sample

    def plain_prose(self, rng: random.Random, length: int) -> Sample:
        sample = Sample()
        sample.add([self.special["<|bos|>"]])
        want = min(length, rng.randrange(60, 400))
        at = rng.randrange(len(self.prose))
        while len(sample.ids) < want:
            sample.add(self.encode(self.prose[at % len(self.prose)] + "\n"))
            at += 1
        return sample

    def small_talk(self, rng: random.Random, length: int) -> Sample:
        sample = Sample()
        sample.add([self.special["<|bos|>"]])
        self.turn(sample, "<|user|>", rng.choice(("Hello", "Hi", "Hello!", "Who are you?", "What can you do?", "Help")))
        self.turn(sample, "<|assistant|>", GREETING)
        return sample
