from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fraqtl_serve.capacity import Pool, make_pool, pool_use

POOL = Pool("k4v4", blocks=1000, block_size=16, block_bytes=2176, baseline_block_bytes=8192, max_model_len=4096)


def test_capacity() -> None:
    assert POOL.capacity(0.25).model_dump() == {
        "kv_format": "k4v4",
        "block_size": 16,
        "block_bytes": 2176,
        "baseline_block_bytes": 8192,
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
    }


def rank(blocks: int, *sizes: int) -> dict[str, Any]:
    return {
        "blocks": blocks,
        "block_size": [16 for _ in sizes],
        "block_bytes": list(sizes),
        "baseline_block_bytes": [4 * size for size in sizes],
    }


def test_ranks_hold_parts_of_the_same_blocks() -> None:
    pool = make_pool("k8v8", [rank(90, 100), rank(80, 100)], 128)
    assert pool == Pool("k8v8", blocks=80, block_size=16, block_bytes=200, baseline_block_bytes=800, max_model_len=128)


def test_groups_take_turns_with_the_same_blocks() -> None:
    pool = make_pool("k4v4", [rank(10, 100, 60)], 128)
    assert (pool.block_bytes, pool.baseline_block_bytes, pool.total_bytes) == (100, 400, 1000)


def family(name: str, *values: float) -> Any:
    return SimpleNamespace(samples=[SimpleNamespace(name=name, value=value) for value in values])


def test_pool_use_is_vllms_gauge() -> None:
    others = [family("vllm:num_requests_running", 7), family("vllm:kv_cache_usage", 9)]
    assert pool_use([*others, family("vllm:kv_cache_usage_perc", 0.25, 0.75)]) == 0.5
    assert pool_use([family("vllm:kv_cache_usage_perc", 0.0)]) == 0.0
    assert pool_use(others) is None
