"""How much a KV pool holds, and what the same memory would hold in the model's own dtype.

Both are vLLM's own sums: layers form groups, all groups draw from one pool of blocks, and a sequence needs blocks in
each of them, fewer in one with a sliding window. Nothing of that is worked out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from fraqtl_vllm import _vllm

Specs = dict[str, Any]
"""vLLM's KVCacheSpec of every layer that stores keys and values on one rank, by the layer's name."""

ENDLESS = 1 << 60
"""Bytes that no plan runs out of; nothing is allocated by planning."""


@dataclass(frozen=True)
class Plan:
    """What one engine's pool holds."""

    block_size: int
    """Tokens a block, in the first group."""
    rank_block_bytes: tuple[int, ...]
    """Of one block, on each rank."""
    blocks: int
    tokens: int
    """In sequences of the longest context, vLLM's "KV cache size"."""
    concurrency: float
    """Sequences of the longest context, vLLM's "Maximum concurrency"."""

    @property
    def block_bytes(self) -> int:
        """Of one block, over all ranks."""
        return sum(self.rank_block_bytes)


def describe(config: _vllm.VllmConfig, pools: Sequence[_vllm.KVCacheConfig]) -> Plan:
    """What the planned `pools`, one a rank, hold together."""
    scheduled = _vllm.generate_scheduler_kv_cache_config(list(pools))
    tokens, concurrency = _vllm.get_kv_cache_capacity(config, scheduled)
    return Plan(
        block_size=scheduled.kv_cache_groups[0].kv_cache_spec.block_size,
        # The groups lie over each other: every tensor is the whole pool.
        rank_block_bytes=tuple(max(t.size for t in pool.kv_cache_tensors) // pool.num_blocks for pool in pools),
        blocks=scheduled.num_blocks,
        tokens=tokens,
        concurrency=concurrency,
    )


def plan(config: _vllm.VllmConfig, specs: Sequence[Specs], memory: Sequence[int], *, length: int | None = None) -> Plan:
    """What `memory` bytes on each rank hold for layers like `specs`, even if that is less than one sequence.

    length: tokens of a sequence, if not the configuration's longest context.
    """
    config = _without_limits(config, length or config.model_config.max_model_len)
    # vLLM refuses to plan what holds no whole sequence: the groups and a block's bytes come from memory without end.
    pools = _vllm.get_kv_cache_configs(config, [dict(one) for one in specs], [ENDLESS] * len(specs))
    endless = describe(config, pools)
    blocks = min(have // one for have, one in zip(memory, endless.rank_block_bytes, strict=True))
    for pool in pools:
        pool.num_blocks = max(0, blocks)
    tokens, concurrency = _vllm.get_kv_cache_capacity(config, _vllm.generate_scheduler_kv_cache_config(pools))
    return replace(endless, blocks=max(0, blocks), tokens=tokens, concurrency=concurrency)


def memory_for_one(config: _vllm.VllmConfig, specs: Sequence[Specs], *, length: int | None = None) -> list[int]:
    """The bytes on each rank with which vLLM starts: one sequence of `length` tokens, and the block it never uses."""
    endless = plan(config, specs, [ENDLESS] * len(specs), length=length)
    blocks = round(endless.blocks / endless.concurrency) + 1
    return [blocks * one for one in endless.rank_block_bytes]


def longest_sequence(config: _vllm.VllmConfig, specs: Sequence[Specs], memory: Sequence[int]) -> int:
    """The longest context, in tokens, that vLLM starts with in `memory` bytes on each rank; 0 if there is none."""
    fits, too_long = 0, config.model_config.max_model_len + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        need = memory_for_one(config, specs, length=middle)
        if all(n <= have for n, have in zip(need, memory, strict=True)):
            fits = middle
        else:
            too_long = middle
    return fits


def unpacked(specs: Specs, dtype: Any) -> Specs:
    """The same layers with pages of `dtype`: the baseline."""
    return {
        name: replace(spec, dtype=dtype, state_content_bytes=None, page_size_padded=None)
        if isinstance(spec, _vllm.AttentionSpec)
        else spec
        for name, spec in specs.items()
    }


def group_block_bytes(pools: Sequence[_vllm.KVCacheConfig], dtype: Any = None) -> list[int]:
    """Bytes of one block in every KV-cache group, over its layers on all ranks, of which each has one of the `pools`.

    With `dtype`, what the same block would take unpacked in that dtype: the baseline.
    """
    groups = zip(*(pool.kv_cache_groups for pool in pools), strict=True)
    return [sum(_page_bytes(part, dtype) for part in group) for group in groups]


def _page_bytes(group: Any, dtype: Any) -> int:
    """Of all layers that one rank has of a group; where they have unlike numbers of KV heads, each has its own spec."""
    spec, names = group.kv_cache_spec, group.layer_names
    is_alike = not isinstance(spec, _vllm.UniformTypeKVCacheSpecs)
    specs = {name: spec if is_alike else spec.kv_cache_specs[name] for name in names}
    if dtype is not None:
        specs = unpacked(specs, dtype)
    return sum(one.page_size_bytes for one in specs.values())


def _without_limits(config: _vllm.VllmConfig, length: int) -> Any:
    """A copy of `config` for sequences of `length` tokens, whose pool has the size of its memory."""
    config = copy(config)
    config.model_config, config.cache_config = copy(config.model_config), copy(config.cache_config)
    config.model_config.max_model_len = config.model_config.original_max_model_len = length
    config.cache_config.num_gpu_blocks_override = None
    return config
