"""`fraqtl-bench totals`: do the server's Prometheus totals equal the sum of what it told its clients?

Random requests, many at once, some of them cut off by their client. The sums over the reports in the
responses, and over the listed records of the requests that were cut off, must be the metrics' gains.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from fraqtl_bench import results
from fraqtl_bench.random_load import Outcome, make_jobs, send_all
from fraqtl_bench.server import running

COUNTERS = {
    "finished requests": 'fraqtl:requests_total{status="finished"}',
    "aborted requests": 'fraqtl:requests_total{status="aborted"}',
    "tokens": "fraqtl:kv_tokens_total",
    "bytes": "fraqtl:kv_bytes_total",
    "saved_bytes": "fraqtl:kv_saved_bytes_total",
    "bytes in the histogram": "fraqtl:request_kv_bytes_sum",
    "requests in the histogram": "fraqtl:request_kv_bytes_count",
}
LONGEST, ANSWER = 200, 24  # tokens: short requests, the accounting is the same
SETTLE_TRIES = 50


def read_counters(url: str) -> Counter[str]:
    lines = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines() if line[0] != "#"
    )
    return Counter({name: int(float(lines[metric])) for name, metric in COUNTERS.items()})


def settled_counters(url: str) -> Counter[str]:
    """The counters when they have stopped: the last response may be out and not counted yet."""
    last = read_counters(url)
    for _ in range(SETTLE_TRIES):
        time.sleep(0.2)
        now = read_counters(url)
        if now == last:
            break
        last = now
    return last


def sums(outcomes: list[Outcome]) -> Counter[str]:
    """What the metrics must have gained, from what the clients know."""
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    return Counter(
        {
            "finished requests": sum(o.status == "finished" for o in outcomes),
            "aborted requests": sum(o.status == "aborted" for o in outcomes),
            "tokens": sum(report["tokens"] for report in reports),
            "bytes": sum(report["bytes"] for report in reports),
            "saved_bytes": sum(report["saved_bytes"] for report in reports),
            "bytes in the histogram": sum(report["bytes"] for report in reports),
            "requests in the histogram": len(reports),
        }
    )


def settled_gain(url: str, before: Counter[str], expected: Counter[str]) -> Counter[str]:
    """What the counters gained; waits a little for them, a response is counted once it is out."""
    for _ in range(SETTLE_TRIES):
        after = read_counters(url)
        gained = Counter({name: after[name] - before[name] for name in COUNTERS})
        if gained == expected:
            break
        time.sleep(0.2)
    return gained


def measure(url: str, *, requests: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Both sides after a load on a server that does nothing else, and whether they are equal."""
    before = settled_counters(url)
    jobs = make_jobs(requests, seed, longest=LONGEST, answer=ANSWER)
    began = time.monotonic()
    outcomes = list(asyncio.run(send_all(url, jobs, concurrency)).values())
    seconds = time.monotonic() - began
    expected = sums(outcomes)
    gained = settled_gain(url, before, expected)
    return {
        "requests": requests,
        "concurrency": concurrency,
        "seconds": round(seconds, 1),
        "failed": [outcome.error for outcome in outcomes if outcome.error],
        "never_reached_the_engine": sum(outcome.status == "unknown" for outcome in outcomes),
        "from_responses": dict(sums([o for o in outcomes if o.status == "finished"])),
        "from_aborted": dict(sums([o for o in outcomes if o.status == "aborted"])),
        "from_prometheus": dict(gained),
        "equal": gained == expected,
    }


def run(args: argparse.Namespace) -> None:
    found: dict[str, Any] = {}
    for count in args.api_servers:
        with running("--api-server-count", str(count)) as server:
            options = {"requests": args.requests, "concurrency": args.concurrency, "seed": args.seed}
            found[str(count)] = measure(server.url, **options)
    table = Table(title=f"{args.requests} requests, {args.concurrency} at once")
    for column in ("API servers", "total of", "responses", "aborted", "Prometheus"):
        table.add_column(column, justify="left" if column == "total of" else "right")
    for count, one in found.items():
        for name in COUNTERS:
            numbers = (one[side].get(name, 0) for side in ("from_responses", "from_aborted", "from_prometheus"))
            table.add_row(count, name, *(f"{number:,}" for number in numbers))
        table.add_section()
    Console().print(table)
    if args.out:
        results.save(args.out, {"totals": found})
    if not all(one["equal"] and not one["failed"] for one in found.values()):
        sys.exit("the totals differ")


def add_command(commands: Any) -> None:
    parser = commands.add_parser("totals", help="compare Prometheus totals with the responses", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--api-servers", nargs="+", type=int, default=[1, 2], metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.set_defaults(run=run)
