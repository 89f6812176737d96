"""CPU write path: centre, rotate, quantise, pack and scatter one batch of tokens into their slots."""

from __future__ import annotations

from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants
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
    used = slots >= 0
    if not bool(used.all()):
        slots, key, value = slots[used], key[used], value[used]
    place = slots // layout.block_size, slice(None), slots % layout.block_size
    k, v, planes = layout.format.k, layout.format.v, layout.planes(pool)
    if k.is_raw:
        planes.k[place] = key.to(planes.k.dtype)
    else:
        codes, scale = encode_keys(key.float(), k, constants)
        planes.k[place] = pack(codes, k)
        if planes.k_scale is not None and scale is not None:
            planes.k_scale[place] = scale
    if v.is_raw:
        planes.v[place] = value.to(planes.v.dtype)
    else:
        codes, scale = encode_values(value.float(), v, constants)
        planes.v[place] = pack(codes, v)
        if planes.v_scale is not None and scale is not None:
            planes.v_scale[place] = scale
