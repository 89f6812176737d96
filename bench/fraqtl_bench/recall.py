"""`fraqtl-bench recall`: does a model still find a fact in a long text, for each cache format?

Texts are prose with codes in it ("The code for apple is 4821."), questions go to the running
server's chat endpoint, and an answer counts if it contains the code. Several questions share a
text, at random depths; every format gets the same texts and questions.
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fraqtl_bench import results
from fraqtl_bench.demo_model.corpus import FACTS, NAMES, grammar_sentence, standard_library_prose
from fraqtl_bench.server import running
from fraqtl_kernels.errors import one_of
from fraqtl_kernels.formats import FORMATS

FACT_SHARE = 0.15  # of the sentences of a text, less where names would run out before its end
SENTENCE_TOKENS = 12  # at least, on average
TEXTS_AT_ONCE = 10
DEPTHS = 5  # parts of a text that answers are counted by


@dataclass(frozen=True)
class Question:
    """depth: where the code stands, 0 (begin of the text) to 1."""

    prompt: str
    answer: str
    depth: float


def make_questions(
    tokenizer: Any,
    context: int,
    count: int,
    per_text: int,
    seed: int,
    prose: list[str] | None = None,
    texts_at_once: int = TEXTS_AT_ONCE,
) -> list[Question]:
    """`count` questions about texts that are `context` tokens long, question and chat wording included.

    prose: half of the sentences; by default from the standard library, which differs between versions of Python. An
    empty list leaves sentences of a grammar, the same everywhere.
    Questions about a text are `texts_at_once` requests apart, so that all but the first find it in
    the prefix cache.
    """
    rng = random.Random(f"{seed}-{context}")
    prose = standard_library_prose(limit_bytes=400_000) if prose is None else prose
    questions: list[Question] = []
    while len(questions) < count:
        asked: list[list[Question]] = []
        for _ in range(texts_at_once):
            text, codes = make_text(rng, prose, tokenizer, context)
            names = rng.sample(sorted(codes), min(per_text, len(codes)))
            asked.append([_question(text, name, codes[name]) for name in names])
        questions += [q for turn in zip_longest(*asked) for q in turn if q is not None]
    return questions[:count]


def _question(text: str, name: str, code: str) -> Question:
    statement, question = (part.format(k=name, v=code) for part in FACTS["code"])
    return Question(f"{text}\n{question}", code, text.index(statement) / len(text))


def make_text(rng: random.Random, prose: list[str], tokenizer: Any, context: int) -> tuple[str, dict[str, str]]:
    names = list(NAMES)
    rng.shuffle(names)
    budget = context - 24  # the question and the chat template's own tokens
    fact_share = min(FACT_SHARE, len(names) * SENTENCE_TOKENS / budget)
    sentences: list[str] = []
    codes: dict[str, str] = {}
    used = 0
    while True:
        if names and (not codes or rng.random() < fact_share):
            name, code = names.pop(), str(rng.randrange(1000, 10000))
            sentence = FACTS["code"][0].format(k=name, v=code)
        else:
            name, sentence = "", rng.choice(prose) if prose and rng.random() < 0.5 else grammar_sentence(rng)
        length = len(tokenizer.encode(" " + sentence, add_special_tokens=False))
        if used + length > budget and codes:
            return " ".join(sentences), codes
        used += length
        sentences.append(sentence)
        if name:
            codes[name] = code


def ask(client: httpx.Client, url: str, model: str, question: Question) -> tuple[bool, int]:
    """Whether the answer holds the code, and how many tokens the prompt had."""
    body = {"model": model, "messages": [{"role": "user", "content": question.prompt}]}
    reply = client.post(f"{url}/v1/chat/completions", json={**body, "temperature": 0, "max_tokens": 24}, timeout=600)
    reply.raise_for_status()
    payload = reply.json()
    return question.answer in payload["choices"][0]["message"]["content"], payload["usage"]["prompt_tokens"]


def measure(url: str, contexts: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy per context of the model that the server at `url` runs."""
    from transformers import AutoTokenizer

    found: dict[str, Any] = {}
    with httpx.Client() as client, Progress() as progress, ThreadPoolExecutor(args.concurrency) as pool:
        model = client.get(f"{url}/v1/models").json()["data"][0]
        tokenizer = AutoTokenizer.from_pretrained(model["root"])
        for context in contexts:
            questions = make_questions(
                tokenizer, context, args.questions, args.per_text, args.seed, texts_at_once=args.texts
            )
            task = progress.add_task(f"context {context}", total=len(questions))
            outcomes = []
            for outcome in pool.map(lambda q: ask(client, url, model["id"], q), questions):
                outcomes.append(outcome)
                progress.advance(task)
            right = [ok for ok, _ in outcomes]
            found[str(context)] = {
                "accuracy": sum(right) / len(right),
                "right": sum(right),
                "longest_prompt": max(tokens for _, tokens in outcomes),
                "by_depth": by_depth(questions, right),
            }
    return found


def by_depth(questions: list[Question], right: list[bool]) -> list[dict[str, int]]:
    """Of each of DEPTHS equal parts of the texts: questions about codes in it, and how many were answered right."""
    parts = [min(int(question.depth * DEPTHS), DEPTHS - 1) for question in questions]
    return [
        {"questions": parts.count(n), "right": sum(ok for part, ok in zip(parts, right, strict=True) if part == n)}
        for n in range(DEPTHS)
    ]


def run(args: argparse.Namespace) -> None:
    for name in args.formats:
        if name not in FORMATS:
            raise one_of("KV format", name, FORMATS)
    accuracy: dict[str, Any] = {}
    if args.url:
        accuracy["server"] = measure(args.url, args.contexts, args)
    else:
        for name in args.formats:
            with running(*args.model, *args.server_args, "--kv-format", name) as server:
                accuracy[name] = measure(server.url, args.contexts, args)
    table = Table(title=f"{args.questions} questions a context, share answered right")
    table.add_column("context", justify="right")
    for name in accuracy:
        table.add_column(name, justify="right")
    for context in args.contexts:
        table.add_row(str(context), *(f"{found[str(context)]['accuracy']:.1%}" for found in accuracy.values()))
    Console().print(table)
    if args.out:
        results.save(args.out, {"recall": accuracy, "questions": args.questions, "per_text": args.per_text})


def add_command(commands: Any) -> None:
    parser = commands.add_parser("recall", help="find facts in long texts, per cache format", description=__doc__)
    parser.add_argument("--model", nargs=1, default=[], help="model to serve (default: the demo model)")
    parser.add_argument("--url", help="measure a server that already runs instead")
    parser.add_argument("--formats", nargs="+", default=["bf16", "k8v8", "k4v4"], metavar="FORMAT")
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--per-text", type=int, default=5, help="questions that share a text (default: %(default)s)")
    parser.add_argument(
        "--texts", type=int, default=TEXTS_AT_ONCE, help="texts that are asked about by turns (default: %(default)s)"
    )
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to the servers")
    parser.set_defaults(run=run)
