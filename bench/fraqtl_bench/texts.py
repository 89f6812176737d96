"""`fraqtl-bench texts`: is greedy text on this machine that of another one, up to rounding?

A server answers questions about long texts, greedily and with the log-probabilities of its two best tokens.
`--out` saves that; `--compare FILE` compares with a file saved elsewhere. Two answers count as equal up to rounding
if they are the same, or if, at the first token that differs, the two best tokens of the saved run lay within
`--margin` nats of each other. Questions hold nothing of Python's own prose, so they are the same under any version.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from fraqtl_bench import results
from fraqtl_bench.recall import make_questions
from fraqtl_bench.server import running
from fraqtl_kernels.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """One greedy completion. gaps: by token, nats between the best and the second best."""

    tokens: list[str]
    gaps: list[float]
    right: bool


def ask(client: httpx.Client, url: str, model: str, prompt: str, wanted: str, tokens: int) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    reply = client.post(
        f"{url}/v1/chat/completions",
        json={**body, "max_tokens": tokens, "logprobs": True, "top_logprobs": 2},
        timeout=600,
    )
    choice = reply.raise_for_status().json()["choices"][0]
    content = choice["logprobs"]["content"]
    best = [sorted((t["logprob"] for t in token["top_logprobs"]), reverse=True) for token in content]
    return Answer(
        [token["token"] for token in content],
        [two[0] - two[1] for two in best],
        wanted in choice["message"]["content"],
    )


def compare(saved: list[Answer], found: list[Answer], margin: float) -> dict[str, Any]:
    """How many are the same, differ where the saved run was undecided, or differ for no such reason.

    Raises ConfigError if the two lists don't answer the same number of questions.
    """
    if len(saved) != len(found):
        raise ConfigError(f"{len(saved)} answers in the file, {len(found)} here: ask the same questions")
    same, rounding, others = 0, 0, []
    for number, (old, new) in enumerate(zip(saved, found, strict=True)):
        if old.tokens == new.tokens:
            same += 1
            continue
        pairs = enumerate(zip(old.tokens, new.tokens, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(old.tokens), len(new.tokens)))
        gap = old.gaps[min(place, len(old.gaps) - 1)]
        if gap <= margin:
            rounding += 1
        else:
            others.append({"question": number, "token": place, "gap": gap})
    return {"same": same, "differ_by_rounding": rounding, "differ": others}


def saved_answers(content: dict[str, Any], contexts: list[int], questions: int) -> list[Answer]:
    """Those of a saved run to the first questions of each of some contexts.

    Raises ConfigError if it wasn't asked as many, or about another context.
    """
    each = len(content["answers"]) // len(content["contexts"])
    if unknown := [context for context in contexts if context not in content["contexts"]]:
        raise ConfigError(f"the file has answers at {content['contexts']} tokens, not at {unknown}")
    if questions > each:
        raise ConfigError(f"the file has {each} answers a context: ask no more than that")
    starts = [content["contexts"].index(context) * each for context in contexts]
    return [Answer(**entry) for start in starts for entry in content["answers"][start : start + questions]]


def run(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    answers = []
    with running(*args.model, *args.server_args) as server, httpx.Client() as client:
        model = client.get(f"{server.url}/v1/models").json()["data"][0]
        tokenizer = AutoTokenizer.from_pretrained(model["root"])
        for context in args.contexts:
            for question in make_questions(tokenizer, context, args.questions, 5, args.seed, prose=[]):
                answers.append(ask(client, server.url, model["id"], question.prompt, question.answer, args.tokens))
    found: dict[str, Any] = {"contexts": args.contexts, "right": sum(a.right for a in answers)}
    if args.compare:
        saved = saved_answers(json.loads(args.compare.read_text()), args.contexts, args.questions)
        found["compared"] = compare(saved, answers, args.margin)
        Console().print(found["compared"])
    if args.out:
        results.save(args.out, {**found, "answers": [asdict(answer) for answer in answers]})
    if args.compare and found["compared"]["differ"]:
        raise ConfigError(f"{len(found['compared']['differ'])} of {len(answers)} answers differ by more than rounding")


def add_command(commands: Any) -> None:
    parser = commands.add_parser("texts", help="compare greedy text with another machine's", description=__doc__)
    parser.add_argument("--model", nargs=1, default=[], help="model to serve (default: the demo model)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 2048], metavar="TOKENS")
    parser.add_argument("--questions", type=int, default=20, help="questions a context (default: 20)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens an answer (default: 24)")
    parser.add_argument("--margin", type=float, default=0.1, help="nats within which rounding decides (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=Path, help="a file that --out wrote, perhaps on another machine")
    parser.add_argument("--out", type=Path, help="write the answers as JSON")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to the server")
    parser.set_defaults(run=run)
