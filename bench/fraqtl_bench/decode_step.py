"""`fraqtl-bench decode-step`: how long the engine takes for a token, by context and cache format.

One server per format runs at the same time, and they take turns: in every round each answers the same
prompts with a fixed number of tokens, and the engine's own histogram of inter-token latency says how long a token
took, prefill and HTTP left out. Prompts are in the prefix cache by then, so nothing but decode steps is timed. What
counts is the median of the rounds, and of the ratios to the first format within a round.

`stock` instead of a format is vLLM without this project. `--one-at-a-time` starts each server when the one before
has ended, for GPUs that don't hold two models; the result is then written after each.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fraqtl_bench import results
from fraqtl_bench.server import STOCK_SERVER, Server, running
from fraqtl_kernels.errors import ConfigError, one_of
from fraqtl_kernels.formats import FORMATS

STOCK = "stock"
METRIC = re.compile(r"^vllm:inter_token_latency_seconds_(sum|count)\{[^}]*\} (\S+)$", re.MULTILINE)
VOCABULARY = range(300, 1000)  # token ids that every model has


@dataclass
class Arm:
    """A running server."""

    name: str
    server: Server
    model: str

    def latency_totals(self, client: httpx.Client) -> dict[str, float]:
        """Sum of all inter-token latencies so far, in seconds, and how many there were."""
        text = client.get(f"{self.server.url}/metrics").raise_for_status().text
        return {kind: float(value) for kind, value in METRIC.findall(text)}

    def complete(self, client: httpx.Client, prompt: list[int], tokens: int) -> None:
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        client.post(f"{self.server.url}/v1/completions", json=body, timeout=1200).raise_for_status()

    def round(self, client: httpx.Client, pool: ThreadPoolExecutor, prompts: list[list[int]], tokens: int) -> float:
        """Seconds per token of one round, by the engine's clock."""
        before = self.latency_totals(client)
        list(pool.map(lambda prompt: self.complete(client, prompt, tokens), prompts))
        after = self.latency_totals(client)
        return (after["sum"] - before["sum"]) / (after["count"] - before["count"])


def measure(arms: list[Arm], context: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per token at one context: per arm, one number a round."""
    rng = random.Random(f"{args.seed}-{context}")
    prompts = [rng.choices(VOCABULARY, k=context) for _ in range(args.batch)]
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    with httpx.Client() as client, ThreadPoolExecutor(args.batch) as pool:
        for arm in arms:  # prompts into the prefix cache, kernels compiled
            arm.round(client, pool, prompts, 8)
        for turn in range(args.rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                seconds[arm.name].append(arm.round(client, pool, prompts, args.tokens))
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds and ratios to the first arm, each as median and quartiles over the rounds."""
    first = next(iter(seconds.values()))
    found: dict[str, Any] = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, first, strict=True)]
        found[name] = {"itl_ms": _spread([v * 1e3 for v in values]), "ratio": _spread(ratios)}
    return found


def _spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low_quartile": low, "high_quartile": high}


def run(args: argparse.Namespace) -> None:
    for name in args.formats:
        if name not in (STOCK, *FORMATS):
            raise one_of("KV format", name, (STOCK, *FORMATS))
    if STOCK in args.formats and not args.model:
        raise ConfigError("stock vLLM doesn't know the demo model: give one with --model")
    seconds: dict[str, dict[str, list[float]]] = {str(context): {} for context in args.contexts}
    turns = [[name] for name in args.formats] if args.one_at_a_time else [args.formats]
    for names in turns:
        with ExitStack() as servers, Progress() as progress:
            arms = [start(name, servers, args) for name in names]
            for context in progress.track(args.contexts, description="contexts"):
                seconds[str(context)] |= measure(arms, context, args)
        _save(seconds, args)
    table = Table(title=f"engine's time per token, batch {args.batch}: ms (ratio to {args.formats[0]})")
    table.add_column("context", justify="right")
    for name in args.formats:
        table.add_column(name, justify="right")
    for context, values in seconds.items():
        entries = summarize(values).values()
        table.add_row(context, *(f"{e['itl_ms']['median']:.3f} ({e['ratio']['median']:.3f}x)" for e in entries))
    Console().print(table)


def _save(seconds: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> None:
    if args.out:
        settings = {"batch": args.batch, "tokens": args.tokens, "rounds": args.rounds}
        measured = {context: summarize(values) for context, values in seconds.items()}
        results.save(args.out, {"decode_step": measured, "one_at_a_time": args.one_at_a_time, **settings})


def start(name: str, servers: ExitStack, args: argparse.Namespace) -> Arm:
    options = [*args.model, "--max-model-len", str(max(args.contexts) + args.tokens + 16), *args.server_args]
    if name == STOCK:
        server = servers.enter_context(running(*options, module=STOCK_SERVER, environment={"VLLM_PLUGINS": ""}))
    else:
        server = servers.enter_context(running(*options, "--kv-format", name))
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    return Arm(name, server, model)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("decode-step", help="time the engine's decode step", description=__doc__)
    parser.add_argument("--model", nargs=1, default=[], help="model to serve (default: the demo model)")
    parser.add_argument("--formats", nargs="+", default=["bf16", "k4v4"], metavar="FORMAT", help="the first is 1x")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048], metavar="TOKENS")
    parser.add_argument("--batch", type=int, default=1, help="requests at once (default: 1)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a request and round (default: 64)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--one-at-a-time", action="store_true", help="never two servers at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to the servers")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.set_defaults(run=run)
