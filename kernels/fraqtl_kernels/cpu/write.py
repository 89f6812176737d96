"""CPU write path: centre, rotate, quantise, refine, pack and scatter one batch of tokens into their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.codec import pack, quantise_static
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.cpu.encode import store_batch
from fraqtl_kernels.cpu.refinements import Finer, Refinements, find_runs, read_earlier
from fraqtl_kernels.cpu.sides import Side
from fraqtl_kernels.formats import DEFAULT_FORMAT, VectorFormat, get_format
from fraqtl_kernels.pages import PageLayout


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
    k, v = layout.format.k, layout.format.v
    refinements = _prepare(pool, layout, key, slots)
    if len(slots) and (k.is_scaled or v.is_scaled):
        finer_k, finer_v = (None, None) if refinements is None else (refinements.key, refinements.value)
        rows_k, rows_v = (None if finer is None else finer.tokens for finer in (finer_k, finer_v))
        keys = Side.of(key, k, 0, layout.k_scale_offset, constants, "key", rows_k)
        values = Side.of(value, v, layout.v_offset, layout.v_scale_offset, constants, "value", rows_v)
        store_batch(pool, slots, keys, values, layout.block_size)
    if not (k.is_scaled and v.is_scaled):
        _store_others(pool, layout, key, value, slots, constants)
    return refinements


def _prepare(pool: Tensor, layout: PageLayout, key: Tensor, slots: Tensor) -> Refinements | None:
    """Room for the refinements of a batch, and those before it. None if nobody will ask."""
    if not layout.format.is_refined or len(slots) < 2:
        return None
    runs = find_runs(slots, layout.block_size)
    if not len(runs):
        return None
    planes, k, v = layout.planes(pool), layout.format.k, layout.format.v
    return Refinements(
        _finer(key.shape, planes.k, planes.k_scale, k, layout, slots, runs),
        _finer(key.shape, planes.v, planes.v_scale, v, layout, slots, runs),
    )


def _finer(
    shape: torch.Size,
    plane: Tensor,
    scales: Tensor | None,
    vector: VectorFormat,
    layout: PageLayout,
    slots: Tensor,
    runs: Tensor,
) -> Finer | None:
    if not vector.refined or scales is None:
        return None
    return Finer(torch.empty(shape, dtype=torch.float32), read_earlier(plane, scales, vector, layout, slots, runs))


def _store_others(
    pool: Tensor, layout: PageLayout, key: Tensor, value: Tensor, slots: Tensor, constants: LayerConstants
) -> None:
    """Vectors without scales of their own: raw and static ones."""
    planes = layout.planes(pool)
    k, v = layout.format.k, layout.format.v
    used = slots >= 0
    if not bool(used.all()):
        slots, key, value = slots[used], key[used], value[used]
    place = slots // layout.block_size, slice(None), slots % layout.block_size
    if not k.is_scaled:
        planes.k[place] = _plain(key, k, constants.key_scale, planes.k.dtype)
    if not v.is_scaled:
        planes.v[place] = _plain(value, v, constants.value_scale, planes.v.dtype)


def _plain(x: Tensor, vector: VectorFormat, step: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if vector.is_raw else pack(quantise_static(x.float(), step, vector), vector)


def warm_up_write() -> None:
    """As `warm_up_decode`."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    x = torch.zeros(1, 1, 64, dtype=torch.float32)
    write(pool, layout, x, x, torch.full((1,), -1))
