"""Centre, rotate, quantise, pack and store vectors on the CPU, compiled: one pass, one vector at a time.

The formulas are those of `reference.encode_keys` and `encode_values`. The rotation H = S ⊗ B of `rotation.py`, with
S of Sylvester's doubling, takes log2 |S| rounds of sums and differences and |B| products a number, in place
of D products. A vector's bytes never depend on what else is in its batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.rotation import hadamard

PARALLEL_VECTORS = 64  # fewer are done before other threads have woken up

_FAST = {"reassoc", "contract", "nsz"}  # not "nnan": NaN must stay NaN


@cache
def _rotation_base(size: int) -> Any:
    """B of H = S ⊗ B, entries ±1, (b, b) float32 with b = 1, 12 or 20."""
    base = size
    while base % 2 == 0 and base not in (12, 20):
        base //= 2
    return hadamard(base).sign().float().numpy()


@njit(fastmath=_FAST, cache=True, nogil=True)
def _rotate(x, spare, base):
    """x <- x · H · sqrt(D), in place."""
    size, width = x.shape[0], base.shape[0]
    half = width
    while half < size:
        for start in range(0, size, 2 * half):
            low, high = x[start : start + half], x[start + half : start + 2 * half]
            for d in range(half):
                a, b = low[d], high[d]
                low[d], high[d] = a + b, a - b
        half *= 2
    if width == 1:
        return
    for start in range(0, size, width):
        for j in range(width):
            spare[j] = np.float32(0)
        for i in range(width):
            row, value = base[i], x[start + i]
            for j in range(width):
                spare[j] += value * row[j]
        for j in range(width):
            x[start + j] = spare[j]


@njit(fastmath=_FAST, cache=True, nogil=True)
def _half_bits(x, word, word_bits):
    """The bits of fp16(x), rounded half to even, for 0 <= x <= 65504 or NaN. word: one float32, word_bits its bits."""
    if x != x:
        return np.uint16(0x7E00)
    if x < np.float32(2.0**-14):
        return np.uint16(np.rint(x * np.float32(2.0**24)))
    word[0] = x
    bits = word_bits[0]
    return np.uint16(((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) - (112 << 10))


@njit(fastmath=_FAST, cache=True, nogil=True)
def _scale_of(x, edge, word, word_bits):
    """Bits of max|x| / edge in fp16; NaN if x holds NaN or infinity."""
    largest, broken = np.float32(0), np.float32(0)
    for d in range(x.shape[0]):
        largest = max(largest, abs(x[d]))
        broken += x[d] * np.float32(0)
    if broken != broken:
        return np.uint16(0x7E00)
    return _half_bits(min(largest / edge, np.float32(65504)), word, word_bits)


@njit(fastmath=_FAST, cache=True, nogil=True, error_model="numpy")
def _codes_of(x, scale, midpoint, levels, codes):
    """codes <- clamp(round(x / scale + midpoint), 0, levels), zero where that is no number."""
    for d in range(x.shape[0]):
        step = np.rint(x[d] / scale + midpoint)
        step = min(max(step, np.float32(0)), levels) if step == step else np.float32(0)
        codes[d] = np.uint8(step)


@njit(fastmath=_FAST, cache=True, nogil=True)
def _store_vector(source, centre, shrink, shift, base, half, raw, raw16, code_at, scale_at, sizes, numbers, buffers):
    """One vector. centre, shrink: (D,) or (0,). shift: (D,) what the sink centre adds after the rotation, or (0,)."""
    bits, groups = sizes
    edge, midpoint, levels, factor = numbers
    x, other, spare, codes, word, word_bits = buffers
    size = x.shape[0]
    for d in range(size):
        x[d] = np.float32(source[d])
    if centre.shape[0]:
        for d in range(size):
            x[d] -= centre[d]
    if shrink.shape[0]:
        for d in range(size):
            x[d] *= shrink[d]
    if base.shape[0]:
        _rotate(x, spare, base)
        for d in range(size):
            x[d] *= factor
    sign = np.uint16(0)
    width = size // groups
    if shift.shape[0]:
        for d in range(size):
            other[d] = x[d] - shift[d]
        mine, its = _scale_of(x, edge, word, word_bits), _scale_of(other, edge, word, word_bits)
        if half[its] < half[mine]:
            sign = np.uint16(0x8000)
            for d in range(size):
                x[d] = other[d]
    for group in range(groups):
        part = x[group * width : (group + 1) * width]
        scale_bits = _scale_of(part, edge, word, word_bits)
        raw16[scale_at // 2 + group] = scale_bits | sign
        _codes_of(part, half[scale_bits], midpoint, levels, codes[group * width : (group + 1) * width])
    parts = 8 // bits
    row = size // parts
    target = raw[code_at : code_at + row]
    for i in range(row):
        packed = codes[i]
        for j in range(1, parts):
            packed |= codes[j * row + i] << np.uint8(j * bits)
        target[i] = packed


@njit(fastmath=_FAST, cache=True, nogil=True)
def _store_range(begin, end, source, slots, constants, base, half, raw, raw16, places, numbers):
    heads, size = source.shape[1], source.shape[2]
    block_size, block_stride, head_stride, code_offset, code_bytes, scale_offset, scale_bytes, bits, groups = places
    centre, shrink, shift = constants
    word_bits = np.empty(1, np.int32)
    buffers = (
        np.empty(size, np.float32),
        np.empty(size, np.float32),
        np.empty(32, np.float32),
        np.empty(size, np.uint8),
        word_bits.view(np.float32),
        word_bits,
    )
    for item in range(begin, end):
        token, head = item // heads, item % heads
        slot = slots[token]
        if slot < 0:
            continue
        page = (slot // block_size) * block_stride + head * head_stride
        offset = slot % block_size
        _store_vector(
            source[token, head],
            centre[head],
            shrink[head],
            shift[head],
            base,
            half,
            raw,
            raw16,
            page + code_offset + offset * code_bytes,
            page + scale_offset + offset * scale_bytes,
            (bits, groups),
            numbers,
            buffers,
        )


@njit(parallel=True, fastmath=_FAST, cache=True, nogil=True)
def _store_parallel(count, source, slots, constants, base, half, raw, raw16, places, numbers):
    step = 32
    for part in prange((count + step - 1) // step):
        _store_range(
            part * step,
            min(part * step + step, count),
            source,
            slots,
            constants,
            base,
            half,
            raw,
            raw16,
            places,
            numbers,
        )


def store(
    pool: Tensor,
    half: Any,
    x: Tensor,
    slots: Tensor,
    vector: VectorFormat,
    block_size: int,
    code_offset: int,
    scale_offset: int,
    constants: LayerConstants | None,
) -> None:
    """Encode x into its slots.

    pool: as for `write`. half: the float32 value of every fp16 bit pattern. x: (tokens, KV heads, D) float32. slots:
    (tokens,) int64. vector: quantised, with scales of its own. constants: what keys are prepared with, or None.
    """
    tokens, heads, size = x.shape
    raw = pool.as_strided((pool.untyped_storage().nbytes() // 2 * 2 - pool.storage_offset(),), (1,)).numpy()
    places = (
        block_size,
        pool.stride(0),
        pool.stride(1),
        code_offset,
        vector.code_bytes(size),
        scale_offset,
        vector.scale_bytes,
        vector.bits,
        vector.groups,
    )
    numbers = tuple(np.float32(n) for n in (vector.edge, vector.midpoint, vector.levels, size**-0.5))
    base = _rotation_base(size) if vector.rotated else np.empty((0, 0), np.float32)
    arguments = (
        x.contiguous().numpy(),
        slots.contiguous().numpy(),
        _arrays(constants, heads)
        if constants is not None and vector.centred
        else (np.empty((heads, 0), np.float32),) * 3,
        base,
        half,
        raw,
        raw.view(np.uint16),
        places,
        numbers,
    )
    if tokens * heads < PARALLEL_VECTORS:
        _store_range(0, tokens * heads, *arguments)
    else:
        _store_parallel(tokens * heads, *arguments)


_PREPARED: WeakKeyDictionary[LayerConstants, Any] = WeakKeyDictionary()


def _arrays(constants: LayerConstants, heads: int) -> Any:
    """centre, 2^-e and the rotated way from the centre to the sink centre: (KV heads, D); (KV heads, 0) if unused."""
    if constants not in _PREPARED:
        none = torch.empty(heads, 0, dtype=torch.float32)
        shift, smoothing = none, constants.smoothing
        if constants.sink_centre is not None:
            away = constants.prepare_keys(constants.sink_centre.float())
            shift = away @ hadamard(away.shape[-1]).to(away.dtype)
        arrays = (
            none if constants.key_centre is None else constants.key_centre.float(),
            none if smoothing is None else 1 / smoothing,
            shift,
        )
        _PREPARED[constants] = tuple(a.contiguous().numpy() for a in arrays)
    return _PREPARED[constants]
