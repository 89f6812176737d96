"""What the KV pool is made of: planned in the engine's process, asked of the workers by the HTTP server.

vLLM plans the pools of all ranks in one call, when the model is loaded and before memory is taken. Here that call also
notes what the plan holds, lets the pool grow to one sequence where nobody chose its size, and says in one sentence
which flags would do where it is too small. vLLM lets a plugin of the HTTP server pair with a method on the worker,
which the server reaches through `engine_client.collective_rpc`. Ours is `fraqtl_kv_pool`: plain numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from fraqtl_kernels.errors import ConfigError
from fraqtl_vllm import _vllm, hooks, hybrids
from fraqtl_vllm.accounting import planner
from fraqtl_vllm.accounting.schema import GroupBytes, PoolNumbers
from fraqtl_vllm.config import FraqtlConfig, settings_of
from fraqtl_vllm.names import BACKEND_NAME

METHOD = hooks.POOL_METHOD.attribute
NOTE = hooks.POOL_NOTE.attribute
"""The attribute of a KVCacheConfig that carries the numbers from the engine to its workers."""
GROUP_NOTE = hooks.GROUP_NOTE.attribute
"""The attribute of a KVCacheConfig that tells the scheduler what a block takes; see `group_bytes`."""

Planner = Callable[[_vllm.VllmConfig, list[planner.Specs], list[int]], list[Any]]


def kv_pool(worker: Any) -> PoolNumbers:
    """What the pool of this worker's engine holds, over all its ranks: see `numbers`."""
    noted: PoolNumbers = getattr(worker.model_runner.kv_cache_config, NOTE)
    return noted.copy()


def numbers(
    config: _vllm.VllmConfig, specs: Sequence[planner.Specs], pools: Sequence[_vllm.KVCacheConfig]
) -> PoolNumbers:
    """The planned pools, and beside them what the same memory would hold in the model's own dtype."""
    ours = planner.describe(config, pools)
    memory = [one * ours.blocks for one in ours.rank_block_bytes]
    plain = [planner.unpacked(one, config.model_config.dtype) for one in specs]
    baseline = planner.plan(config, plain, memory, layout=hybrids.PLAIN_LAYOUT)
    return {
        "max_model_len": config.model_config.max_model_len,
        "block_size": ours.block_size,
        "block_bytes": ours.block_bytes,
        "blocks": ours.blocks,
        "tokens": ours.tokens,
        "concurrency": ours.concurrency,
        "attention_bytes": ours.attention_bytes,
        "state_bytes": ours.state_bytes,
        "padding_bytes": ours.padding_bytes,
        "baseline_block_size": baseline.block_size,
        "baseline_block_bytes": baseline.block_bytes,
        "baseline_blocks": baseline.blocks,
        "baseline_tokens": baseline.tokens,
        "baseline_concurrency": baseline.concurrency,
        "baseline_attention_bytes": baseline.attention_bytes,
        "baseline_padding_bytes": baseline.padding_bytes,
    }


def group_bytes(config: _vllm.VllmConfig, pools: Sequence[_vllm.KVCacheConfig]) -> GroupBytes:
    """What a block of every group takes in the planned `pools`, one a rank, and in the model's own dtype."""
    return {
        "block_bytes": planner.group_block_bytes(pools),
        "baseline_block_bytes": planner.group_block_bytes(pools, config.model_config.dtype),
        "state_block_bytes": planner.group_block_bytes(pools, states=True),
    }


def plan_pools(
    original: Planner, config: _vllm.VllmConfig, specs: list[planner.Specs], memory: list[int]
) -> list[_vllm.KVCacheConfig]:
    """vLLM's `get_kv_cache_configs`, for our backend. Raises ConfigError where no whole sequence fits."""
    backend = config.attention_config.backend
    if backend is None or backend.name != BACKEND_NAME or not any(specs):
        return original(config, specs, memory)
    ours = settings_of(config)
    if ours.kv_memory_fits_context:
        memory = grown(config, specs, memory)
    try:
        pools = original(config, specs, memory)
    except ValueError as error:
        sentence = too_small(config, ours, specs, memory)
        if sentence is None:
            raise
        raise ConfigError(sentence) from error
    for pool in pools:
        hooks.POOL_NOTE.put(pool, numbers(config, specs, pools))
    return pools


def grown(config: _vllm.VllmConfig, specs: list[planner.Specs], memory: list[int]) -> list[int]:
    """`memory`, or as much as one sequence of the longest context takes, up to half of what is free."""
    is_settled = config.cache_config.num_gpu_blocks_override or config.model_config.original_max_model_len == -1
    need = max(planner.memory_for_one(config, specs))
    if is_settled or need <= min(memory):
        return memory
    node = _vllm.get_allowed_cpu_list()[0].numa_node
    size = max(min(memory), min(need, _vllm.get_memory_node_info(node).available_memory // 2 // len(specs)))
    config.cache_config.kv_cache_memory_bytes = size
    length = config.model_config.max_model_len
    logger = _vllm.init_logger("vllm.fraqtl.pool")
    logger.info("KV memory: %s bytes a rank, for a context of %s tokens", f"{size:,}", f"{length:,}")
    return [size] * len(specs)


def too_small(
    config: _vllm.VllmConfig, ours: FraqtlConfig, specs: list[planner.Specs], memory: list[int]
) -> str | None:
    """Why a sequence of the longest context doesn't fit into `memory`, and what would do; None if it fits."""
    need, blocks = planner.memory_for_one(config, specs), config.cache_config.num_gpu_blocks_override
    if blocks is not None:
        block_bytes = planner.plan(config, specs, memory).rank_block_bytes
        memory = [blocks * one for one in block_bytes]
    rank = max(range(len(specs)), key=lambda r: need[r] - memory[r])
    if need[rank] <= memory[rank]:
        return None
    have = max(0, memory[rank])
    if blocks is not None:
        given, cure = (
            f"--num-gpu-blocks-override {blocks} makes it",
            f"--num-gpu-blocks-override {need[0] // block_bytes[0]}",
        )
    else:
        given, cure = _given(config, ours), f"--kv-cache-memory-bytes {need[rank]}"
    length, fits = config.model_config.max_model_len, planner.longest_sequence(config, specs, memory)
    return (
        f"the longest sequence (--max-model-len), {length} tokens, takes {need[rank]} bytes of KV memory, but "
        f"{given} {have}: give {cure}" + (f", or --max-model-len {fits}" if fits else "")
    )


def _given(config: _vllm.VllmConfig, ours: FraqtlConfig) -> str:
    """Where the size of the pool comes from, as the beginning of a clause that the size ends."""
    if ours.kv_memory_fits_context:
        return "half of the free memory is"
    size = config.cache_config.kv_cache_memory_bytes
    if size is None:
        return f"--gpu-memory-utilization {config.cache_config.gpu_memory_utilization:g} leaves"
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space.isdigit() and size == int(space) << 30:
        return f"VLLM_CPU_KVCACHE_SPACE={space} gives"
    return "--kv-cache-memory-bytes is"


def install() -> None:
    """Give the method to every kind of worker, and plan with us. Called before an engine or a worker is made."""
    hooks.POOL_METHOD.put(_vllm.WorkerBase, kv_pool)
    hooks.PLAN.wrap(_vllm.engine_core(), _planned_with_us)


def _planned_with_us(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_configs(vllm_config: Any, kv_cache_specs: Any, available_memory: Any, *groups: Any) -> Any:
        """groups: of layers, one argument since vLLM 0.33. They depend on the specs only."""

        def planned(config: Any, specs: Any, memory: Any) -> Any:
            return original(config, specs, memory, *groups)

        pools = plan_pools(planned, vllm_config, kv_cache_specs, available_memory)
        for pool in pools:  # whatever the backend: its scheduler may be ours
            hooks.GROUP_NOTE.put(pool, group_bytes(vllm_config, pools))
        return pools

    return get_kv_cache_configs
