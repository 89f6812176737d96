"""Requests that no client should send, many at a time, and what a live server makes of them.

    python -m tests.e2e.fuzz --requests 2000 --out bench/results/cpu/fuzz.json

starts a server with the demo model, sends them four times and writes what came back: how often each status, every
answer of 500 and above (an error inside a stream, too) with the request it was given to, which requests got no answer
in time, what still ran and lay in the pool a while after, and the memory of the server's processes after each round.
A cache is full after the first half of the rounds, a leak goes on: over the second half the API server's process, where
our HTTP code runs, may hardly grow. The engine's grows on for eight rounds or so, ever less, and no less with vLLM's
own scheduler (--scheduler-cls): it has a bound of its own.
Exits with 1 unless all of that is as it should be. The same --seed sends the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.e2e.fuzz_requests import Attempt, make_attempt
from tests.e2e.reports import metric
from tests.e2e.server import Server, group_members, running

CONCURRENCY = 16
ROUNDS = 4
# A small pool: memory is resident once it was written to, so a large one grows until all its blocks had a turn.
FLAGS = ("--kv-cache-memory-bytes", "16M")
SECONDS = 60  # in which a request must have its answer
QUIET_SECONDS = 60  # in which everything must have ended afterwards
ENGINE = "VLLM::EngineCor"  # the kernel cuts names off
# Bytes that each may grow by over the second half of the rounds: the engine's process, and all others together.
MEMORY_BOUNDS = {"engine": 32 << 20, "others": 4 << 20}
STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


@dataclass
class Outcome:
    """What a number of requests led to."""

    requests: int = 0
    answers: Counter[str] = field(default_factory=Counter)  # by status, or by what came in its place
    kinds: Counter[str] = field(default_factory=Counter)
    server_errors: list[dict[str, Any]] = field(default_factory=list)
    unanswered: list[dict[str, Any]] = field(default_factory=list)

    def add(self, attempt: Attempt, answer: bytes | None) -> None:
        self.requests += 1
        self.kinds[attempt.kind] += 1
        if answer is None:
            self.answers["none in time"] += 1
            self.unanswered.append(attempt.described())
            return
        statuses = [int(status) for status in STATUS.findall(answer)]
        if attempt.hangs_up:
            self.answers["client hung up"] += 1
        elif statuses:
            self.answers[str(statuses[-1])] += 1
        else:
            self.answers["connection closed"] += 1
        if any(status >= 500 for status in statuses) or b'"code": 500' in answer:
            self.server_errors.append({**attempt.described(), "answer": answer[-500:].decode(errors="replace")})


async def send(attempt: Attempt, host: str, port: int) -> bytes | None:
    """Send it as it is; returns all that came back, None if the server kept silent for too long."""
    try:
        return await asyncio.wait_for(_send(attempt, host, port), SECONDS)
    except TimeoutError:
        return None


async def _send(attempt: Attempt, host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    answer = b""
    try:
        for piece in attempt.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(attempt.pause)
        if attempt.hangs_up:
            if attempt.reads:
                answer = await reader.read(attempt.reads)
            writer.transport.abort()
        else:
            answer = await reader.read()  # every request says that its connection is the last
    except ConnectionError:
        pass  # the server may hang up, too
    finally:
        writer.close()
    return answer


async def send_all(attempts: list[Attempt], url: str, outcome: Outcome) -> None:
    address = urlsplit(url)
    host, port = str(address.hostname), int(address.port or 80)
    room = asyncio.Semaphore(CONCURRENCY)

    async def one(attempt: Attempt) -> None:
        async with room:
            outcome.add(attempt, await send(attempt, host, port))

    await asyncio.gather(*map(one, attempts))


def left_over(server: Server) -> dict[str, float]:
    """What still runs, waits, or lies in the pool, once it had time to end."""
    end = time.monotonic() + QUIET_SECONDS
    while True:
        capacity = httpx.get(f"{server.url}/plugins/fraqtl/capacity", timeout=30).json()
        left = {
            "running": metric(server.url, "vllm:num_requests_running"),
            "waiting": metric(server.url, "vllm:num_requests_waiting"),
            "pool_use": float(capacity["pool_use"]),
        }
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.2)


def memory(server: Server) -> dict[str, int]:
    """Bytes that the server's processes hold for themselves, by name: mapped files come and go as the kernel likes."""
    sizes: Counter[str] = Counter()
    for pid in group_members(server):
        status = Path(f"/proc/{pid}/status").read_text()
        name, size = (re.search(rf"^{key}:\s+(\S+)", status, re.M) for key in ("Name", "RssAnon"))
        if name and size:
            sizes[name[1]] += int(size[1]) * 1024
    return dict(sizes)


def run(server: Server, requests: int, seed: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Fuzz a server that nobody else talks to: the same requests in every round."""
    rng = random.Random(seed)
    attempts = [make_attempt(rng) for _ in range(requests)]
    started, outcome = time.monotonic(), Outcome()
    sizes = [memory(server)]
    for _ in range(rounds):
        asyncio.run(send_all(attempts, server.url, outcome))
        left = left_over(server)
        sizes.append(memory(server))
    seconds = time.monotonic() - started
    return {
        "distinct_requests": requests,
        "requests": outcome.requests,
        "concurrency": CONCURRENCY,
        "seconds": round(seconds, 1),
        "kinds": dict(sorted(outcome.kinds.items())),
        "answers": dict(sorted(outcome.answers.items())),
        "server_errors": outcome.server_errors,
        "unanswered": outcome.unanswered,
        "left_over": left,
        "memory_at_first_bytes": sizes[0],
        "memory_bytes": sizes[1:],  # after each round
        "memory_growth_bytes": growth(sizes[(rounds + 1) // 2], sizes[-1]),
        "memory_bound_bytes": MEMORY_BOUNDS,
    }


def growth(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Bytes that the engine's process and all others grew by, from what `memory` said."""
    engine = after.get(ENGINE, 0) - before.get(ENGINE, 0)
    return {"engine": engine, "others": sum(after.values()) - sum(before.values()) - engine}


def problems(result: dict[str, Any]) -> list[str]:
    found = [f"{len(result[key])} {key}: {result[key][:3]}" for key in ("server_errors", "unanswered") if result[key]]
    if any(result["left_over"].values()):
        found.append(f"not all ended: {result['left_over']}")
    for whose, grown in result["memory_growth_bytes"].items():
        if grown > result["memory_bound_bytes"][whose]:
            found.append(f"memory of {whose} grew by {grown} bytes, more than {result['memory_bound_bytes'][whose]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often they are sent (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheduler-cls", help="of the server, to compare with vLLM's own")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args()
    scheduler = ("--scheduler-cls", args.scheduler_cls) if args.scheduler_cls else ()
    with running(*FLAGS, *scheduler) as server:
        result = run(server, args.requests, args.seed, args.rounds)
    command = f"python -m tests.e2e.fuzz --requests {args.requests} --rounds {args.rounds} --seed {args.seed}"
    command = " ".join([command, *scheduler])
    text = json.dumps({"command": command, "seed": args.seed, **result}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    found = problems(result)
    print("\n".join(found) or "as it should be", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
