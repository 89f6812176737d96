"""`fraqtl-bench overhead`: what the reports cost, in throughput and in time to the first token.

Two servers run the same model with the same KV format on the same engine: ours, and vLLM's own `serve`
with its stock scheduler, which loads no HTTP plugin and so sends no reports. One is loaded while the other
idles, by turns, with the same random prompts; each pair of runs gives one ratio. Runs are short and pairs many:
what else happens on the machine is then in both runs of a pair, or in few pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from fraqtl_bench import closed_loop, results
from fraqtl_bench.closed_loop import Load
from fraqtl_bench.server import STOCK_SERVER, Server, cpu_seconds, running
from fraqtl_kernels.errors import FraqtlError

MEMORY = str(256 << 20)
MEASURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms")


def ours_running(model: list[str], kv_format: str) -> AbstractContextManager[Server]:
    return running(*model, "--kv-format", kv_format, "--kv-cache-memory-bytes", MEMORY)


def running_without_reports(path: str, name: str, kv_format: str) -> AbstractContextManager[Server]:
    config = json.dumps({"fraqtl": {"kv_format": kv_format}})
    flags = ["--additional-config", config, "--served-model-name", name, "--kv-cache-memory-bytes", MEMORY]
    backend = ["--attention-backend", "FRAQTL", "--enforce-eager"]
    return running(path, *backend, *flags, module=STOCK_SERVER)


def check_arms(ours: Server, without: Server, model: str) -> None:
    """Raises FraqtlError unless one server reports and the other doesn't, with the same answer from both."""
    body = {"model": model, "prompt": "The farmer", "max_tokens": 8, "temperature": 0}
    answers = [httpx.post(f"{s.url}/v1/completions", json=body, timeout=120).json() for s in (ours, without)]
    reports = ["fraqtl" in answer for answer in answers]
    if reports != [True, False] or httpx.get(f"{without.url}/plugins/fraqtl/capacity").status_code != 404:
        raise FraqtlError(f"the two servers are not what they should be: {answers}")
    if answers[0]["choices"][0]["text"] != answers[1]["choices"][0]["text"]:
        raise FraqtlError(f"the two servers don't give the same answer: {answers}")


def measure(arms: dict[str, Server], name: str, model: str, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One run on the server `name`, and how many cores the other one, which has nothing to do, took meanwhile."""
    [idle] = (server for other, server in arms.items() if other != name)
    before, began = cpu_seconds(idle), time.monotonic()
    found = closed_loop.run(arms[name].url, Load(model, args.requests, args.concurrency, args.input, args.output, seed))
    return {**found, "cores_of_the_idle_server": round((cpu_seconds(idle) - before) / (time.monotonic() - began), 4)}


def ratios(pairs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Of every measure: ours over the other, pair by pair, its median, quartiles and extremes."""
    found = {}
    for name in MEASURES:
        each = [pair["with"][name] / pair["without"][name] for pair in pairs]
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        found[name] = {
            "ratios": [round(ratio, 4) for ratio in each],
            "median": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "extremes": [round(min(each), 4), round(max(each), 4)],
        }
    return found


def run(args: argparse.Namespace) -> None:
    pairs: list[dict[str, dict[str, float]]] = []
    with ExitStack() as servers:
        ours = servers.enter_context(ours_running(args.model, args.kv_format))
        model = httpx.get(f"{ours.url}/v1/models").json()["data"][0]
        without = servers.enter_context(running_without_reports(model["root"], model["id"], args.kv_format))
        check_arms(ours, without, model["id"])
        arms = {"with": ours, "without": without}
        for name in arms:
            measure(arms, name, model["id"], args, seed=args.pairs)  # not counted: first touches of code and memory
        for turn in range(args.pairs):
            order = ("with", "without") if turn % 2 == 0 else ("without", "with")
            pairs.append({name: measure(arms, name, model["id"], args, seed=turn) for name in order})
            print(f"pair {turn + 1} of {args.pairs}: {pairs[-1]}", flush=True)
    found = ratios(pairs)
    show(pairs, found)
    idle = max(run["cores_of_the_idle_server"] for pair in pairs for run in pair.values())
    print(f"the server that idled took at most {idle:.1%} of a core")
    if args.out:
        shape = {name: getattr(args, name) for name in ("kv_format", "concurrency", "requests", "input", "output")}
        results.save(args.out, {"load": shape, "pairs": pairs, "ratios": found})


def show(pairs: list[dict[str, dict[str, float]]], found: dict[str, Any]) -> None:
    table = Table(title=f"With reports over without: medians of {len(pairs)} pairs of runs")
    for column in ("measure", "without", "ratio", "quartiles", "extremes"):
        table.add_column(column, justify="left" if column == "measure" else "right", no_wrap=True)
    for name, one in found.items():
        plain = statistics.median(pair["without"][name] for pair in pairs)
        spread = ("-".join(f"{value:.3f}" for value in one[key]) for key in ("quartiles", "extremes"))
        table.add_row(name, f"{plain:,.1f}", f"{one['median']:.3f}", *spread)
    Console().print(table)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("overhead", help="what the reports cost a loaded server", description=__doc__)
    parser.add_argument("--model", nargs=1, default=[], help="model to serve (default: the demo model)")
    parser.add_argument("--kv-format", default="k4v4")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=160, help="of one run (default: %(default)s)")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.set_defaults(run=run)
