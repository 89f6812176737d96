"""A small load test: several users, every prompt another one.

    python examples/load_test.py [--users 4] [--requests 16] [--words 64] [--tokens 32]

A prompt that was sent before would be found in the prefix cache, and measure that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from server import connect

WORDS = ("river", "stone", "garden", "market", "winter", "letter", "engine", "window", "forest", "silver", "bridge")


@dataclass
class Asked:
    first_token: float
    tokens: int
    bytes: int
    saved: int


def ask(client: OpenAI, model: str, words: int, tokens: int) -> Asked:
    started, first, count = time.perf_counter(), None, 0
    report: dict[str, Any] = {}
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Repeat: " + " ".join(random.choices(WORDS, k=words))}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            count += 1
        report = (chunk.model_extra or {}).get("fraqtl", report)
    return Asked(first or 0.0, count, report["bytes"], report["saved_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("users", 4), ("requests", 16), ("words", 64), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    client, model = connect()
    started = time.perf_counter()
    with ThreadPoolExecutor(args.users) as pool:
        asked = list(pool.map(lambda _: ask(client, model, args.words, args.tokens), range(args.requests)))
    seconds = time.perf_counter() - started
    print(f"{args.requests} requests of {args.users} users in {seconds:.1f} s")
    print(f"output        {sum(a.tokens for a in asked) / seconds:.0f} tokens/s")
    print(f"first token   {1000 * statistics.median(a.first_token for a in asked):.0f} ms, median")
    held, saved = (sum(values) / len(asked) / 1024 for values in ([a.bytes for a in asked], [a.saved for a in asked]))
    print(f"KV memory     {held:.0f} KiB a request, {saved:.0f} KiB saved")


if __name__ == "__main__":
    main()
