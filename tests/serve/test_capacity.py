from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fraqtl_serve.reports.capacity import Load, read_load
from tests.serve.pools import pool


def test_capacity() -> None:
    assert pool().capacity(Load(0.25, 3, 1)).model_dump() == {
        "kv_format": "k4v4",
        "kv_formats": None,
        "block_size": 16,
        "block_bytes": 2176,
        "baseline_block_size": 16,
        "baseline_block_bytes": 8192,
        "baseline_dtype": "half",
        "ratio": 3.7647,
        "pool_bytes": 2176000,
        "blocks": 1000,
        "baseline_blocks": 265,  # 2176000 / 8192 = 265.6: a part of a block holds nothing
        "tokens": 16000,
        "baseline_tokens": 4240,
        "max_model_len": 4096,
        "concurrency": 3.91,
        "baseline_concurrency": 1.04,
        "attention_bytes": 557056,
        "state_bytes": 0,
        "padding_bytes": 0,
        "baseline_attention_bytes": 2097152,
        "baseline_padding_bytes": 0,
        "pool_use": 0.25,
        "running": 3,
        "waiting": 1,
    }


def test_tokens_and_sequences_are_the_engines_own_count() -> None:
    """Not its blocks times 16: a token of a model with sliding windows needs blocks in several groups."""
    said = pool(tokens=6222, concurrency=1.519, baseline_tokens=1655, baseline_concurrency=0.404).capacity(Load())
    assert (said.tokens, said.concurrency) == (6222, 1.52)
    assert (said.baseline_tokens, said.baseline_concurrency) == (1655, 0.4)


def test_ratio_counts_by_token() -> None:
    """A block of a hybrid model has another number of tokens in the model's own dtype."""
    said = pool(block_size=96, block_bytes=9600, baseline_block_size=32, baseline_block_bytes=12160)
    assert said.ratio == 3.8


def test_engines_beside_each_other_hold_each_their_own_blocks() -> None:
    three = pool(engines=3)
    assert (three.blocks, three.block_bytes, three.total_bytes) == (3000, 2176, 3 * 2176000)
    assert (three.tokens, three.concurrency) == (48000, 3000 / 256)
    assert (three.baseline_blocks, three.baseline_tokens, three.baseline_concurrency) == (795, 12720, 795 / 256)


def family(name: str, *values: float) -> Any:
    return SimpleNamespace(samples=[SimpleNamespace(name=name, value=value) for value in values])


def test_load_is_vllms_gauges() -> None:
    counts = [family("vllm:num_requests_running", 7, 2), family("vllm:num_requests_waiting", 0)]
    others = [family("vllm:kv_cache_usage", 9), family("vllm:num_requests_waiting_by_reason", 5)]
    assert read_load([*counts, *others, family("vllm:kv_cache_usage_perc", 0.25, 0.75)]) == Load(0.5, 9, 0)
    assert read_load([family("vllm:kv_cache_usage_perc", 0.0)]) == Load(0.0, None, None)
    assert read_load(others) == Load(None, None, None)
