"""Requests that no client should send, many at a time, and what a live server makes of them.

    python -m tests.e2e.fuzz --requests 2000 --out bench/results/cpu/fuzz.json

starts a server with the demo model, sends them twice and writes what came back: how often each status, every answer
of 500 and above (an error inside a stream, too) with the request it was given to, which requests got no answer in
time, what still ran and lay in the pool a while after, and the memory of the server's processes over the second time.
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
PARTS = 4  # memory is looked at after each
SECONDS = 60  # in which a request must have its answer
QUIET_SECONDS = 60  # in which everything must have ended afterwards
MEMORY_BOUND = 32 << 20  # bytes that the server's processes may have grown by, all together
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
    """Resident bytes of the server's processes, by name."""
    sizes: Counter[str] = Counter()
    for pid in group_members(server):
        status = Path(f"/proc/{pid}/status").read_text()
        name, size = (re.search(rf"^{key}:\s+(\S+)", status, re.M) for key in ("Name", "VmRSS"))
        if name and size:
            sizes[name[1]] += int(size[1]) * 1024
    return dict(sizes)


def run(server: Server, requests: int, seed: int) -> dict[str, Any]:
    """Fuzz a server that nobody else talks to."""
    rng = random.Random(seed)
    attempts = [make_attempt(rng) for _ in range(requests)]
    started, outcome = time.monotonic(), Outcome()
    first = memory(server)
    asyncio.run(send_all(attempts, server.url, outcome))
    left_over(server)
    # Once more the same: by now vLLM's caches (of grammars, say) hold what they will.
    sizes = [memory(server)]
    for part in (attempts[i * requests // PARTS : (i + 1) * requests // PARTS] for i in range(PARTS)):
        asyncio.run(send_all(part, server.url, outcome))
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
        "memory_at_first_bytes": first,
        "memory_bytes": sizes,  # when each had been sent once, and after each quarter of the second time
        "memory_growth_bytes": sum(sizes[-1].values()) - sum(sizes[0].values()),
        "memory_bound_bytes": MEMORY_BOUND,
    }


def problems(result: dict[str, Any]) -> list[str]:
    found = [f"{len(result[key])} {key}: {result[key][:3]}" for key in ("server_errors", "unanswered") if result[key]]
    if any(result["left_over"].values()):
        found.append(f"not all ended: {result['left_over']}")
    if result["memory_growth_bytes"] > result["memory_bound_bytes"]:
        found.append(f"memory grew by {result['memory_growth_bytes']} bytes, more than {result['memory_bound_bytes']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args()
    with running() as server:
        result = run(server, args.requests, args.seed)
    command = f"python -m tests.e2e.fuzz --requests {args.requests} --seed {args.seed}"
    text = json.dumps({"command": command, "seed": args.seed, **result}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    found = problems(result)
    print("\n".join(found) or "as it should be", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
