from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fraqtl_serve.capacity import Load, Pool, make_pool, read_load

POOL = Pool("k4v4", 1000, 16, block_bytes=2176, baseline_block_bytes=8192, max_model_len=4096, baseline_dtype="half")


def test_capacity() -> None:
    assert POOL.capacity(Load(0.25, 3, 1)).model_dump() == {
        "kv_format": "k4v4",
        "block_size": 16,
        "block_bytes": 2176,
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
        "pool_use": 0.25,
        "running": 3,
        "waiting": 1,
    }


def rank(blocks: int, *sizes: int) -> dict[str, Any]:
    return {
        "blocks": blocks,
        "block_size": [16 for _ in sizes],
        "block_bytes": list(sizes),
        "baseline_block_bytes": [4 * size for size in sizes],
    }


def test_ranks_hold_parts_of_the_same_blocks() -> None:
    pool = make_pool("k8v8", [rank(90, 100), rank(80, 100)], 128, "half")
    assert pool == Pool("k8v8", 80, 16, 200, 800, 128, "half")


def test_groups_take_turns_with_the_same_blocks() -> None:
    pool = make_pool("k4v4", [rank(10, 100, 60)], 128, "half")
    assert (pool.block_bytes, pool.baseline_block_bytes, pool.total_bytes) == (100, 400, 1000)


def test_engines_beside_each_other_hold_each_their_own_blocks() -> None:
    pool = make_pool("k4v4", [rank(10, 100), rank(10, 100)], 128, "half", engines=3)
    assert (pool.blocks, pool.block_bytes, pool.total_bytes) == (30, 200, 6000)


def family(name: str, *values: float) -> Any:
    return SimpleNamespace(samples=[SimpleNamespace(name=name, value=value) for value in values])


def test_load_is_vllms_gauges() -> None:
    counts = [family("vllm:num_requests_running", 7, 2), family("vllm:num_requests_waiting", 0)]
    others = [family("vllm:kv_cache_usage", 9), family("vllm:num_requests_waiting_by_reason", 5)]
    assert read_load([*counts, *others, family("vllm:kv_cache_usage_perc", 0.25, 0.75)]) == Load(0.5, 9, 0)
    assert read_load([family("vllm:kv_cache_usage_perc", 0.0)]) == Load(0.0, None, None)
    assert read_load(others) == Load(None, None, None)
