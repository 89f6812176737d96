"""What the KV pool is made of, asked of the workers that hold it.

vLLM lets a plugin of the HTTP server pair with a method on the worker, which the server reaches through
`engine_client.collective_rpc`. Ours is `fraqtl_kv_pool`: plain numbers, in the shape of an account's sizes.
"""

from __future__ import annotations

from typing import Any

METHOD = "fraqtl_kv_pool"


def kv_pool(worker: Any) -> dict[str, Any]:
    """Blocks in the pool and, by KV-cache group, the bytes of one of them on this rank."""
    from fraqtl_vllm.scheduler import block_bytes

    config = worker.model_runner.kv_cache_config
    return {
        "blocks": config.num_blocks,
        "block_size": [group.kv_cache_spec.block_size for group in config.kv_cache_groups],
        "block_bytes": block_bytes(config, 1),
        "baseline_block_bytes": block_bytes(config, 1, worker.model_config.dtype),
    }


def install() -> None:
    """Give the method to every kind of worker. Called in the processes that run one, before it is made."""
    from fraqtl_vllm._vllm import WorkerBase

    setattr(WorkerBase, METHOD, kv_pool)
