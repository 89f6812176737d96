"""A pool as a worker tells of it: layers of one kind, 16 tokens a block."""

from __future__ import annotations

from typing import Any, cast

from fraqtl_serve.reports.capacity import Pool, make_pool
from fraqtl_vllm.accounting.schema import PoolNumbers

SAID: PoolNumbers = {
    "max_model_len": 4096,
    "block_size": 16,
    "block_bytes": 2176,
    "blocks": 1000,
    "tokens": 16000,
    "concurrency": 1000 / 256,
    "attention_bytes": 256 * 2176,
    "state_bytes": 0,
    "padding_bytes": 0,
    "baseline_block_size": 16,
    "baseline_block_bytes": 8192,
    "baseline_blocks": 265,
    "baseline_tokens": 4240,
    "baseline_concurrency": 265 / 256,
    "baseline_attention_bytes": 256 * 8192,
    "baseline_padding_bytes": 0,
}


def pool(dtype: str = "half", engines: int = 1, **said: Any) -> Pool:
    return make_pool("k4v4", cast(PoolNumbers, {**SAID, **said}), dtype, engines)
