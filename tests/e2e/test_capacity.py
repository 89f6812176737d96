"""The pool's size as the page tells it, against the line in which vLLM tells it when it starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import Run, run
from tests.e2e.random_models import (
    random_gemma2,
    random_gemma3,
    random_gemma4,
    random_llama,
    random_mistral,
    random_nemotron_nas,
)

LINE = re.compile(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x")


def said_by_vllm(started: Run) -> tuple[int, float]:
    """Tokens, and sequences of the longest context."""
    [(tokens, sequences)] = LINE.findall(started.log)
    return int(tokens.replace(",", "")), float(sequences)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: random_llama(folder, 64),
        random_gemma2,
        random_gemma3,
        random_gemma4,
        random_mistral,
        random_nemotron_nas,
    ],
    ids=[
        "uniform",
        "half with a window",
        "five of six with a window",
        "heads of 256 and 512",
        "all with a window",
        "KV heads differ",
    ],
)
def test_pool_and_baseline_are_what_vllm_says(make: Callable[[Path], Path], tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    of: dict[str, Any] = {"model": model, "max_num_batched_tokens": 256, "sampling": {"max_tokens": 1}}
    of["trust_remote_code"] = True  # the configuration of a Nemotron-NAS is code beside it
    packed = run([[5, 6, 7]], kv_cache_memory_bytes=16 << 20, **of)
    pool = packed.kv_pool
    assert (pool["tokens"], round(pool["concurrency"], 2)) == said_by_vllm(packed)
    memory = pool["blocks"] * pool["block_bytes"]
    assert memory == packed.pool["bytes"]

    plain = run([[5, 6, 7]], kv_format="bf16", kv_cache_memory_bytes=memory, **of)
    assert (pool["baseline_tokens"], round(pool["baseline_concurrency"], 2)) == said_by_vllm(plain)
    assert pool["baseline_blocks"] == plain.kv_pool["blocks"]
