"""CPU write path: center, rotate, quantize, encode residuals, pack and scatter one batch of tokens into their slots."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.codec import pack, quantize_static
from fraqtl_kernels.cpu.kernels.store import TILE, Batch, store_range
from fraqtl_kernels.cpu.operands import LayerOperands
from fraqtl_kernels.cpu.pages import Pool
from fraqtl_kernels.cpu.residual import Residuals, StreamResiduals, find_runs, read_earlier
from fraqtl_kernels.cpu.share import share
from fraqtl_kernels.formats import DEFAULT_FORMAT, VectorFormat, get_format
from fraqtl_kernels.pages import PageLayout

PARALLEL_VECTORS = 128  # fewer are done before other threads have woken up
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOTHING = np.empty(0, np.float32)


def write(
    pool: Tensor,
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    operands: LayerOperands,
) -> Residuals | None:
    """Store keys and values of a batch.

    pool: (blocks, KV heads, N, bytes) uint8, see `PageLayout.planes`. key, value: (tokens, KV heads, D)
    in a floating dtype, any strides. slot_mapping: (>= tokens,) block · N + offset; negative: skip. The tokens of a
    request stand next to each other, in their order. Returns their residuals, for `attend`, or None if the format
    has none or no request has more than one token.
    """
    slots = slot_mapping[: key.shape[0]].long()
    key, value = key[: len(slots)], value[: len(slots)]
    k, v = layout.format.k, layout.format.v
    residuals = _prepare(pool, layout, key, slots)
    if len(slots) and (k.is_scaled or v.is_scaled):
        key, value = _readable(key), _readable(value)
        batch, pages = batch_of(operands, key, value, residuals), Pool.of(pool, layout, with_residual=True)
        arguments = batch, slots.contiguous().numpy(), pages
        tiles = -(-len(slots) // TILE)
        if 2 * len(slots) * pool.shape[1] < PARALLEL_VECTORS:
            store_range(0, tiles, *arguments)
        else:
            share(lambda begin, end: store_range(begin, end, *arguments), tiles)
    if not (k.is_scaled and v.is_scaled):
        _store_others(pool, layout, key, value, slots, operands)
    return residuals


def _prepare(pool: Tensor, layout: PageLayout, key: Tensor, slots: Tensor) -> Residuals | None:
    """Room for the residuals of a batch, and those before it. None if nobody will ask."""
    if not layout.format.has_residual or len(slots) < 2:
        return None
    runs = find_runs(slots, layout.block_size)
    if not len(runs):
        return None
    planes, k, v = layout.planes(pool), layout.format.k, layout.format.v
    return Residuals(
        _stream_residuals(key.shape, planes.k, planes.k_scale, k, layout, slots, runs),
        _stream_residuals(key.shape, planes.v, planes.v_scale, v, layout, slots, runs),
    )


def _stream_residuals(
    shape: torch.Size,
    plane: Tensor,
    scales: Tensor | None,
    vector: VectorFormat,
    layout: PageLayout,
    slots: Tensor,
    runs: Tensor,
) -> StreamResiduals | None:
    if not vector.has_residual or scales is None:
        return None
    return StreamResiduals(
        torch.empty(shape, dtype=torch.float32), read_earlier(plane, scales, vector, layout, slots, runs)
    )


def _store_others(
    pool: Tensor, layout: PageLayout, key: Tensor, value: Tensor, slots: Tensor, operands: LayerOperands
) -> None:
    """Vectors without scales of their own: raw and static ones."""
    planes = layout.planes(pool)
    k, v = layout.format.k, layout.format.v
    used = slots >= 0
    if not bool(used.all()):
        slots, key, value = slots[used], key[used], value[used]
    place = slots // layout.block_size, slice(None), slots % layout.block_size
    if not k.is_scaled:
        planes.k[place] = _plain(key, k, operands.key.scale, planes.k.dtype)
    if not v.is_scaled:
        planes.v[place] = _plain(value, v, operands.value.scale, planes.v.dtype)


def _plain(x: Tensor, vector: VectorFormat, step: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if vector.is_raw else pack(quantize_static(x.float(), step, vector), vector)


def batch_of(operands: LayerOperands, key: Tensor, value: Tensor, residuals: Residuals | None) -> Batch:
    """What `store_range` takes. key, value: as `_readable` gives them; they must outlive it."""
    streams = operands.streams.copy()
    kept = (None, None) if residuals is None else (residuals.key, residuals.value)
    for record, x, residual in zip(streams, (key, value), kept, strict=True):
        each = x.element_size()
        record["address"], record["kind"] = x.data_ptr(), _KINDS[x.dtype]
        record["token_stride"], record["head_stride"] = x.stride(0) * each, x.stride(1) * each
        record["keeps_residual"] = residual is not None
    return Batch(
        (operands.key.table, operands.value.table),
        tuple(_NOTHING if residual is None else residual.tokens.view(-1).numpy() for residual in kept),
        (operands.key.hadamard_base, operands.value.hadamard_base),
        streams,
    )


def _readable(x: Tensor) -> Tensor:
    """(tokens, KV heads, D) in a dtype that compiled loops read, with the numbers of a vector side by side."""
    x = x if x.dtype in _KINDS else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def warm_up_write() -> None:
    """As `warm_up_decode`."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    x = torch.zeros(1, 1, 64, dtype=torch.float32)
    write(pool, layout, x, x, torch.full((1,), -1), LayerOperands.of(layout, 1))
