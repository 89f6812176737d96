"""Streaming completions in a closed loop: so many in flight, the next one starts when one has ended.

The client shares its cores with the server it measures, so it does next to nothing: it reads bytes off a socket,
notes when the first and the last of them came, and parses no JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from fraqtl_kernels.errors import FraqtlError

VOCABULARY = range(200, 2000)  # of the demo model: no special tokens
EVENT, DONE = b"data: {", b'"finish_reason":"length"'
SECONDS = 300.0  # for one request


@dataclass(frozen=True)
class Load:
    """So many requests with random prompts, the same for the same seed; every answer has exactly `output` tokens."""

    model: str
    requests: int
    concurrency: int
    input: int
    output: int
    seed: int

    def bodies(self) -> list[bytes]:
        rng = random.Random(self.seed)
        fixed = {"model": self.model, "max_tokens": self.output, "ignore_eos": True, "temperature": 0, "stream": True}
        prompts = (rng.choices(VOCABULARY, k=self.input) for _ in range(self.requests))
        return [json.dumps({**fixed, "prompt": prompt}).encode() for prompt in prompts]


def run(url: str, load: Load) -> dict[str, float]:
    """Tokens a second, and medians over requests of the times to the first and between tokens, in milliseconds."""
    return asyncio.run(_run(url, load))


async def _run(url: str, load: Load) -> dict[str, float]:
    address = urlsplit(url)
    waiting = load.bodies()[::-1]
    times: list[tuple[float, float]] = []

    async def worker() -> None:
        while waiting:
            body = waiting.pop()
            times.append(await asyncio.wait_for(_ask(str(address.hostname), int(address.port or 80), body), SECONDS))

    began = time.perf_counter()
    try:
        await asyncio.gather(*(worker() for _ in range(load.concurrency)))
    except (OSError, TimeoutError) as error:
        raise FraqtlError(f"the server at {url} failed under load: {error!r}") from error
    seconds = time.perf_counter() - began
    return {
        "output_throughput": load.requests * load.output / seconds,
        "median_ttft_ms": 1e3 * statistics.median(first for first, _ in times),
        "median_tpot_ms": 1e3 * statistics.median((last - first) / max(1, load.output - 1) for first, last in times),
    }


async def _ask(host: str, port: int, body: bytes) -> tuple[float, float]:
    """Seconds to the first event and to the end of one stream. Raises FraqtlError if it isn't whole."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer, first = b"", 0.0
        while piece := await reader.read(1 << 16):
            answer += piece
            if not first and EVENT in answer:
                first = time.perf_counter() - began
        last = time.perf_counter() - began
    finally:
        writer.close()
    if not answer.startswith(b"HTTP/1.1 200") or DONE not in answer:
        raise FraqtlError(f"a request was not answered in full: {answer[:300].decode(errors='replace')}")
    return first, last
