"""How much a KV pool holds, and what the same memory would hold in the model's own dtype.

Both are vLLM's own sums: layers form groups, all groups draw from one pool of blocks, and a sequence needs blocks in
each of them, fewer in one with a sliding window. Nothing of that is worked out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from fraqtl_vllm import _vllm, hybrids

Specs = dict[str, Any]
"""vLLM's KVCacheSpec of every layer that stores keys and values on one rank, by the layer's name."""

ENDLESS = 1 << 60
"""Bytes that no plan runs out of; nothing is allocated by planning."""


@dataclass(frozen=True)
class Plan:
    """What one engine's pool holds."""

    block_size: int
    """Tokens a block, in the first group that attends."""
    rank_block_bytes: tuple[int, ...]
    """Of one block, on each rank."""
    blocks: int
    tokens: int
    """In sequences of the longest context, vLLM's "KV cache size"."""
    concurrency: float
    """Sequences of the longest context, vLLM's "Maximum concurrency"."""
    attention_bytes: int
    """Of one sequence of the longest context, over all ranks: what its keys and values take."""
    state_bytes: int
    """What its states take, in models that have some."""
    padding_bytes: int
    """What its blocks have beside these: the last ones are not counted as full."""

    @property
    def block_bytes(self) -> int:
        """Of one block, over all ranks."""
        return sum(self.rank_block_bytes)


def describe(config: _vllm.VllmConfig, pools: Sequence[_vllm.KVCacheConfig]) -> Plan:
    """What the planned `pools`, one a rank, hold together."""
    scheduled = _vllm.generate_scheduler_kv_cache_config(list(pools))
    tokens, concurrency = _vllm.get_kv_cache_capacity(config, scheduled)
    # The groups lie over each other: every tensor is the whole pool.
    rank_block_bytes = tuple(max(t.size for t in pool.kv_cache_tensors) // pool.num_blocks for pool in pools)
    attention, states, held = map(sum, zip(*map(_parts, repeat(config), pools, rank_block_bytes), strict=True))
    return Plan(
        block_size=first_attention(scheduled.kv_cache_groups).kv_cache_spec.block_size,
        rank_block_bytes=rank_block_bytes,
        blocks=scheduled.num_blocks,
        tokens=tokens,
        concurrency=concurrency,
        attention_bytes=attention,
        state_bytes=states,
        padding_bytes=held - attention - states,
    )


def first_attention(groups: Sequence[Any]) -> Any:
    """The first of a pool's groups whose layers attend; the first of all in a model without."""
    return next((g for g in groups if isinstance(g.kv_cache_spec, _vllm.AttentionSpec)), groups[0])


def _parts(config: _vllm.VllmConfig, pool: _vllm.KVCacheConfig, block_bytes: int) -> tuple[int, int, int]:
    """Of a sequence of the longest context on one rank: bytes of its tokens, of its states, of all its blocks."""
    length, attention, states, held = config.model_config.max_model_len, 0, 0, 0
    for group in pool.kv_cache_groups:
        specs = list(_vllm.iter_layer_specs(group.kv_cache_spec))
        blocks = max(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs)
        held += blocks * block_bytes
        for spec in specs if len(specs) > 1 else specs * len(group.layer_names):
            if isinstance(spec, _vllm.AttentionSpec):
                tokens = min(length, blocks * spec.block_size)
                attention += tokens * spec.unpadded_page_size_bytes // spec.block_size
            else:
                states += blocks * spec.state_content_size_bytes
    return attention, states, held


def plan(
    config: _vllm.VllmConfig,
    specs: Sequence[Specs],
    memory: Sequence[int],
    *,
    length: int | None = None,
    layout: str | None = None,
) -> Plan:
    """What `memory` bytes on each rank hold for layers like `specs`, even if that is less than one sequence.

    length: tokens of a sequence, if not the configuration's longest context. layout: vLLM's name of one, if not the
    configuration's.
    """
    config = _without_limits(config, length or config.model_config.max_model_len)
    config.cache_config.kv_cache_layout = layout or config.cache_config.kv_cache_layout
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
    """The same layers with pages of `dtype`, in blocks as vLLM cuts them: the baseline."""
    plain = {
        name: replace(spec, dtype=dtype, state_content_bytes=None, page_size_padded=None)
        if isinstance(spec, _vllm.AttentionSpec)
        else spec
        for name, spec in specs.items()
    }
    return hybrids.cut_as_vllm_does(plain)


def group_block_bytes(pools: Sequence[_vllm.KVCacheConfig], dtype: Any = None, *, states: bool = False) -> list[int]:
    """Bytes of one block in every KV-cache group, over its layers on all ranks, of which each has one of the `pools`.

    With `dtype`, what the same block would take unpacked in that dtype: the baseline. 0 in groups whose layers keep
    states; with `states` only those count.
    """
    wholes = [_interleaved_block(pool) if dtype is None else None for pool in pools]
    groups = zip(*(pool.kv_cache_groups for pool in pools), strict=True)
    return [
        sum(whole or _page_bytes(part, dtype) for part, whole in zip(group, wholes, strict=True))
        if keeps_states(group[0]) == states
        else 0
        for group in groups
    ]


def keeps_states(group: Any) -> bool:
    """Whether the layers of a group keep states in the place of keys and values."""
    return all(isinstance(spec, _vllm.MambaSpec) for spec in _vllm.iter_layer_specs(group.kv_cache_spec))


def _interleaved_block(pool: _vllm.KVCacheConfig) -> int | None:
    """Bytes of any block of a rank where blocks lie one after the other, with pages of all layers of a group."""
    tensors = pool.kv_cache_tensors
    if not tensors or any(t.block_stride * pool.num_blocks != t.size for t in tensors):
        return None
    stride: int = tensors[0].block_stride
    return stride


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
