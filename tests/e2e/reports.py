"""What the demo model's KV memory must come to, worked out by hand for the tests of live clients."""

from __future__ import annotations

from math import ceil
from typing import Any

import httpx

MODEL = "fraqtl-demo"
QUESTION = "The code for apple is 4821. The code for lemon is 7310.\nWhat is the code for apple?"
ANSWER = "The code for apple is 4821."

BLOCK_SIZE = 16
BLOCK_BYTES = 4 * 2 * BLOCK_SIZE * 68  # layers, KV heads, tokens, bytes of a k4v4 key and value at head size 64
BASELINE_BLOCK_BYTES = 4 * 2 * BLOCK_SIZE * 256  # the same in bfloat16

COUNTS = {"tokens", "blocks", "shared_blocks", "loaded_blocks", "bytes", "baseline_bytes", "saved_bytes", "state_bytes"}


def messages(question: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": question}]


def check(report: dict[str, Any], *, tokens: int, blocks: int) -> None:
    """`report` is a `fraqtl` object of the demo model that counts so many tokens and blocks."""
    expected = {
        "version": 1,
        "kv_format": "k4v4",
        "tokens": tokens,
        "blocks": blocks,
        "block_size": BLOCK_SIZE,
        "bytes": blocks * BLOCK_BYTES,
        "baseline_bytes": blocks * BASELINE_BLOCK_BYTES,
        "saved_bytes": blocks * (BASELINE_BLOCK_BYTES - BLOCK_BYTES),
        "state_bytes": 0,
        "ratio": round(256 / 68, 4),
    }
    assert expected.items() <= report.items(), (report, expected)
    assert 0 <= report["loaded_blocks"] <= report["shared_blocks"] <= blocks, report


def check_sequence(report: dict[str, Any], usage: Any) -> None:
    """`report` tells of one sequence with the token counts of `usage`, an OpenAI-style object."""
    tokens = usage.prompt_tokens + usage.completion_tokens - 1
    check(report, tokens=tokens, blocks=ceil(tokens / BLOCK_SIZE))


def check_mirror(kv_cache: dict[str, Any], report: dict[str, Any]) -> None:
    """`kv_cache`, from a usage object, holds the report's counts as plain integers and nothing else."""
    assert kv_cache == {key: report[key] for key in COUNTS}, (kv_cache, report)
    assert all(type(value) is int for value in kv_cache.values()), kv_cache


def metric(url: str, name: str, client: httpx.Client | None = None) -> float:
    """The sum of a metric of the server over its labels. client: to ask with, a new one by default."""
    lines = (client or httpx).get(f"{url}/metrics").text.splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    assert values, f"the server has no metric {name}"
    return sum(values)
