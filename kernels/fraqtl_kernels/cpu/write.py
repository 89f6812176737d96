"""CPU write path: rotate, quantise, pack and scatter one batch of tokens into their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.reference import pack, quantise, rotate


def write(pool: Tensor, layout: PageLayout, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """Store keys and values of a batch.

    pool: (blocks, KV heads, N, bytes) uint8, see `PageLayout.planes`. key, value: (tokens, KV heads, D)
    in a floating dtype, any strides. slot_mapping: (>= tokens,) block · N + offset; negative: skip.
    """
    slots = slot_mapping[: key.shape[0]]
    used = slots >= 0
    if not bool(used.all()):
        slots, key, value = slots[used], key[used], value[used]
    block, offset = slots // layout.block_size, slots % layout.block_size
    planes = layout.planes(pool)
    _scatter(key, layout.format.k, planes.k, planes.k_scale, block, offset)
    _scatter(value, layout.format.v, planes.v, planes.v_scale, block, offset)


def _scatter(
    x: Tensor, vector: VectorFormat, plane: Tensor, scales: Tensor | None, block: Tensor, offset: Tensor
) -> None:
    if scales is None:
        plane[block, :, offset] = x.to(plane.dtype)
        return
    codes, scale = quantise(rotate(x.to(torch.float32), vector), vector)
    plane[block, :, offset] = pack(codes, vector)
    scales[block, :, offset] = scale
