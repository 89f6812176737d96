"""CPU write path: centre, rotate, quantise, refine, pack and scatter one batch of tokens into their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.cpu.decode import half_table
from fraqtl_kernels.cpu.encode import PARALLEL_VECTORS, store
from fraqtl_kernels.cpu.refinements import Finer, Refinements, find_runs, read_earlier
from fraqtl_kernels.formats import DEFAULT_FORMAT, VectorFormat, get_format
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.reference import encode_keys, encode_values, pack


def write(
    pool: Tensor,
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    constants: LayerConstants = IDENTITY,
) -> Refinements | None:
    """Store keys and values of a batch.

    pool: (blocks, KV heads, N, bytes) uint8, see `PageLayout.planes`. key, value: (tokens, KV heads, D)
    in a floating dtype, any strides. slot_mapping: (>= tokens,) block · N + offset; negative: skip. The tokens of a
    request stand next to each other, in their order. Returns their refinements, for `attend`, or None if the format
    has none or no request has more than one token.
    """
    slots = slot_mapping[: key.shape[0]].long()
    key, value = key[: len(slots)], value[: len(slots)]
    k, v, planes = layout.format.k, layout.format.v, layout.planes(pool)
    runs = find_runs(slots, layout.block_size) if layout.format.is_refined else slots[:0]
    finer_k, finer_v = (
        _finer(x, vector, plane, scales, layout, slots, runs)
        for x, vector, plane, scales in ((key, k, planes.k, planes.k_scale), (value, v, planes.v, planes.v_scale))
    )
    if k.is_scaled:
        at = (layout.block_size, 0, layout.k_scale_offset)
        store(pool, half_table(), key.float(), slots, k, *at, constants, "key", _rows(finer_k, key))
    if v.is_scaled:
        at = (layout.block_size, layout.v_offset, layout.v_scale_offset)
        store(pool, half_table(), value.float(), slots, v, *at, constants, "value", _rows(finer_v, value))
    if not (k.is_scaled and v.is_scaled):
        _store_others(planes, layout, key, value, slots, constants)
    return Refinements(finer_k, finer_v) if len(runs) else None


def _finer(
    x: Tensor,
    vector: VectorFormat,
    plane: Tensor,
    scales: Tensor | None,
    layout: PageLayout,
    slots: Tensor,
    runs: Tensor,
) -> Finer | None:
    """Room for the refinements of a batch, and those before it. None if nobody will ask."""
    if not (vector.refined and len(runs)) or scales is None:
        return None
    return Finer(torch.zeros(x.shape, dtype=torch.float32), read_earlier(plane, scales, vector, layout, slots, runs))


def _rows(finer: Finer | None, x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:2], 0, dtype=torch.float32) if finer is None else finer.tokens


def _store_others(
    planes: Planes, layout: PageLayout, key: Tensor, value: Tensor, slots: Tensor, constants: LayerConstants
) -> None:
    """Vectors without scales of their own: raw and static ones."""
    k, v = layout.format.k, layout.format.v
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
