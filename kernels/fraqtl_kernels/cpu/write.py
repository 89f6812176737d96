"""CPU write path: centre, rotate, quantise, pack and scatter one batch of tokens into their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.cpu.decode import half_table
from fraqtl_kernels.cpu.encode import PARALLEL_VECTORS, store
from fraqtl_kernels.formats import DEFAULT_FORMAT, get_format
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.reference import encode_keys, encode_values, pack


def write(
    pool: Tensor,
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    constants: LayerConstants = IDENTITY,
) -> None:
    """Store keys and values of a batch.

    pool: (blocks, KV heads, N, bytes) uint8, see `PageLayout.planes`. key, value: (tokens, KV heads, D)
    in a floating dtype, any strides. slot_mapping: (>= tokens,) block · N + offset; negative: skip.
    """
    slots = slot_mapping[: key.shape[0]]
    key, value = key[: len(slots)], value[: len(slots)]
    k, v, planes = layout.format.k, layout.format.v, layout.planes(pool)
    if k.is_scaled:
        at = (layout.block_size, 0, layout.k_scale_offset)
        store(pool, half_table(), key.float(), slots.long(), k, *at, constants, "key")
    if v.is_scaled:
        at = (layout.block_size, layout.v_offset, layout.v_scale_offset)
        store(pool, half_table(), value.float(), slots.long(), v, *at, constants, "value")
    if k.is_scaled and v.is_scaled:
        return
    used = slots >= 0
    if not bool(used.all()):
        slots, key, value = slots[used], key[used], value[used]
    place = slots // layout.block_size, slice(None), slots % layout.block_size
    if not k.is_scaled:
        planes.k[place] = key.to(planes.k.dtype) if k.is_raw else pack(encode_keys(key.float(), k, constants)[0], k)
    if not v.is_scaled:
        planes.v[place] = (
            value.to(planes.v.dtype) if v.is_raw else pack(encode_values(value.float(), v, constants)[0], v)
        )


def warm_up_write() -> None:
    """As `warm_up_decode`, for both ways of `store`."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    for tokens in (1, PARALLEL_VECTORS):
        x = torch.zeros(tokens, 1, 64, dtype=torch.float32)
        write(pool, layout, x, x, torch.full((tokens,), -1))
