"""What a second run asks of servers, one server a process.

    python -m fraqtl_bench.gpu.serving latency --format k4v4|stock --points 1x2048 16x2048 --out FILE ...
    python -m fraqtl_bench.gpu.serving prefix --out FILE ...

latency: the engine's time per token by requests x context; the file is written after every point. prefix: the same
long prompt twice, with the flags that a server has by default; the second one must find the first in the prefix cache.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from fraqtl_bench import decode_step, results
from fraqtl_bench.server import Server, running

HITS = re.compile(r"^vllm:prefix_cache_hits(?:_total)?\{[^}]*\} (\S+)$", re.MULTILINE)
POINT = re.compile(r"(\d+)x(\d+)")


def point(text: str) -> tuple[int, int]:
    match = POINT.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: give requests x context, like 16x2048")
    return int(match[1]), int(match[2])


def latency(args: argparse.Namespace) -> None:
    measured: dict[str, Any] = {}
    args.contexts = [context for _, context in args.points]
    started = time.monotonic()
    with ExitStack() as servers:
        arm = decode_step.start(args.format, servers, args)
        found = {"format": args.format, "start_seconds": time.monotonic() - started}
        for requests, context in args.points:
            args.batch = requests
            seconds = decode_step.measure([arm], context, args)
            name = f"{requests}x{context}"
            measured[name] = decode_step.summarize(seconds)[args.format]["itl_ms"]
            print(f"{name}: {measured[name]['median']:.3f} ms a token", flush=True)
            results.save(args.out, {**found, "itl_ms": measured}, quiet=True)


def prefix(args: argparse.Namespace) -> None:
    started = time.monotonic()
    with running(*args.model, *args.server_args) as server, httpx.Client() as client:
        found: dict[str, Any] = {"start_seconds": time.monotonic() - started}
        model = client.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        answers, hits = [], [_hits(client, server)]
        for _ in range(2):
            answers.append(_ask(client, server, model, args.context))
            hits.append(_hits(client, server))
    found |= {"hits": [after - before for before, after in pairwise(hits)]}
    results.save(args.out, {**found, "same_text": answers[0] == answers[1]})
    print(found, flush=True)
    if not found["hits"][1] > 0:
        sys.exit("the second prompt did not find the first in the prefix cache")


def _ask(client: httpx.Client, server: Server, model: str, context: int) -> str:
    prompt = [300 + number % 700 for number in range(context)]
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    reply = client.post(f"{server.url}/v1/completions", json=body, timeout=120)
    return str(reply.raise_for_status().json()["choices"][0]["text"])


def _hits(client: httpx.Client, server: Server) -> float:
    """Tokens found in the prefix cache so far."""
    return sum(map(float, HITS.findall(client.get(f"{server.url}/metrics").raise_for_status().text)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("latency")
    one.add_argument("--format", required=True)
    one.add_argument("--points", nargs="+", type=point, required=True)
    one.add_argument("--tokens", type=int, default=48)
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(run=latency, seed=0)
    other = commands.add_parser("prefix")
    other.add_argument("--context", type=int, default=1000)
    other.set_defaults(run=prefix)
    for command in (one, other):
        command.add_argument("--model", nargs=1, default=[])
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--server-args", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
