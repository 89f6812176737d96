"""Encode and store the keys and values of a batch on the CPU, compiled: by heads and tiles of tokens.

The formulas are those of `reference.encode_keys` and `encode_values`. A tile is TILE tokens of one head, or fewer: its
vectors are multiplied by the basis together (`products.py`), then each is rounded by itself (`calibrated.py`,
`plain.py`). Nothing is added up across vectors, and every sum has one order, so a vector's bytes never depend on what
else is in its batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fraqtl_kernels.cpu.kernels.calibrated import encode, encode_residual, scale_of
from fraqtl_kernels.cpu.kernels.calibrated import extent as extent_of
from fraqtl_kernels.cpu.kernels.lanes import WIDTH, half_bits, load, load_bfloat16, load_float16, load_float32, store
from fraqtl_kernels.cpu.kernels.plain import encode_plain, encode_plain_residual, rotate
from fraqtl_kernels.cpu.kernels.products import ROWS, multiply

TILE = 4 * ROWS  # tokens

_NEGATIVE = 0x8000  # the sign bit of a scale


@njit(cache=True, nogil=True)
def _load_vector(address, kind, table, center, x, row, size):
    """x[row : row + size] <- the vector in memory minus the center that begins at table[center], unless that is < 0."""
    each = 4 if kind == 0 else 2
    for d in range(0, size, WIDTH):
        if kind == 1:
            number = load_bfloat16(address + d * each)
        elif kind == 2:
            number = load_float16(address + d * each)
        else:
            number = load_float32(address + d * each)
        if center >= 0:
            number = number - load(table, center + d)
        store(x, row + d, number)


@njit(cache=True, nogil=True)
def _choose_center(z, at, size, table, shift, other, edge):
    """z[at : at + size] <- the vector with the outlier center in place of its own where its scale is smaller then.

    shift: where in `table` the way between the centers begins, in the basis. other: (size,) spare. edge: of the grid.
    Returns the sign bit.
    """
    for d in range(0, size, WIDTH):
        store(other, d, load(z, at + d) - load(table, shift + d))
    center_extent, outlier_extent = extent_of(z, at, size), extent_of(other, 0, size)
    if not (
        center_extent[1] and outlier_extent[1] and scale_of(outlier_extent[0], edge) < scale_of(center_extent[0], edge)
    ):
        return 0
    for d in range(0, size, WIDTH):
        store(z, at + d, load(other, d))
    return _NEGATIVE


@njit(cache=True, nogil=True)
def make_spaces(rows, size):
    """Room for a tile whose vectors, and what `multiply` adds to make whole ROWS of them, are `rows`."""
    return (
        np.zeros(rows * size, np.float32),
        np.empty(rows * size, np.float32),
        np.empty(3 * WIDTH * (size // 2), np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.int64),
        np.empty(TILE, np.int64),
        np.empty(TILE, np.int64),
        np.empty(size, np.uint8),
    )


class Batch(NamedTuple):
    """The keys and the values of a batch. Pairs: keys, values.

    tables, hadamard_bases: of `operands.StreamOperands`. residuals: flat (tokens, KV heads, D) float32 <- what
    residuals stand for, zero for tokens without, or nothing. streams: (2,) of `STREAM`.
    """

    tables: Any
    residuals: Any
    hadamard_bases: Any
    streams: Any


@njit(cache=True, nogil=True)
def store_tile(head, first, last, batch, stream_index, slots, pool, spaces):
    """Tokens first .. last - 1 of one head, keys (stream_index 0) or values (1). See `store_range`."""
    table, residual = batch.tables[stream_index], batch.residuals[stream_index]
    hadamard_base = batch.hadamard_bases[stream_index]
    stream, pages = batch.streams[stream_index], pool.pages[0]
    bits, groups, distance = stream.bits, stream.groups, stream.distance
    calibrated, is_kept = stream.is_calibrated == 1, stream.keeps_residual == 1
    feeds_back = stream.feeds_back == 1
    numbers = stream.edge, stream.midpoint, stream.levels
    block_size, heads, size = pages.block_size, pages.heads, pages.head_size
    x, z, spare, scales, code_at, token_of, signs, codes = spaces
    tokens = slots.shape[0]
    center = head * stream.head_numbers if calibrated else -1
    count = 0
    for token in range(first, last):
        slot = slots[token]
        if slot < 0:
            for d in range(size if is_kept else 0):
                residual[(token * heads + head) * size + d] = np.float32(0)
            continue
        place = stream.address + token * stream.token_stride + head * stream.head_stride
        _load_vector(place, stream.kind, table, center, x, count * size, size)
        page = (slot // block_size) * pages.block_stride + head * pages.head_stride
        code_at[count] = page + stream.code_offset + (slot % block_size) * stream.code_bytes
        token_of[count] = token
        signs[count] = 0
        count += 1
    if calibrated:
        matrix = center + 2 * size
        multiply(x, count, size, table, matrix, z)
        if stream.is_shifted == 1:
            for t in range(count):
                signs[t] = _choose_center(z, t * size, size, table, center + size, x, stream.edge)
        if feeds_back:
            feedback = matrix + size * size
            structured = stream.is_structured == 1
            encode(z, count, size, bits, numbers, table, feedback, structured, spare, codes, pool.raw, code_at, scales)
    for t in range(count):
        token = token_of[t]
        slot = slots[token]
        offset = slot % block_size
        page = (slot // block_size) * pages.block_stride + head * pages.head_stride
        scale_at = page + stream.scale_offset + offset * stream.scale_bytes
        row = z[t * size : (t + 1) * size] if calibrated else x[t * size : (t + 1) * size]
        if feeds_back:
            pool.raw16[scale_at // 2] = np.uint16(half_bits(scales[t]) | signs[t])
        else:
            if hadamard_base.shape[0]:
                rotate(row, z, hadamard_base)
                for d in range(size):
                    row[d] *= stream.unit
            encode_plain(row, codes, bits, groups, numbers, pool.raw, pool.raw16, code_at[t], scale_at)
            pool.raw16[scale_at // 2] |= np.uint16(signs[t])
        residual_at = (token * heads + head) * size if is_kept else -1
        if distance == 0 or offset + distance >= block_size:
            for d in range(size if is_kept else 0):
                residual[residual_at + d] = np.float32(0)
            continue
        residual_code_at = code_at[t] + distance * stream.code_bytes
        residual_scale_at = scale_at + distance * stream.scale_bytes
        if token + distance < tokens and slots[token + distance] == slot + distance:
            residual_code_at = -1  # a token of this batch goes there
        if residual_code_at < 0 and residual_at < 0:
            continue
        if feeds_back:
            scale = encode_residual(
                z, t * size, size, bits, numbers, codes, pool.raw, residual_code_at, residual, residual_at
            )
            if residual_code_at >= 0:
                pool.raw16[residual_scale_at // 2] = np.uint16(half_bits(scale))
        else:
            encode_plain_residual(
                row,
                codes,
                bits,
                groups,
                numbers,
                pool.raw,
                pool.raw16,
                residual_code_at,
                residual_scale_at,
                residual,
                residual_at,
            )


@njit(cache=True, nogil=True)
def store_range(begin, end, batch, slots, pool):
    """Encode tiles begin .. end - 1 of a batch's tokens into its slots, and residuals into those behind them.

    Head by head, so that the matrices of one stay in the cache, first the keys. Keys or values without scales of their
    own are left out here. slots: (tokens,) int64, negative: skip. pool: `pages.Pool`.
    """
    heads, size = pool.pages[0].heads, pool.pages[0].head_size
    first, after = begin * TILE, min(end * TILE, slots.shape[0])
    spaces = make_spaces(min(TILE, after - first + ROWS - 1), size)  # `multiply` works on whole ROWS
    for item in range(2 * heads):
        stream, head = item // heads, item % heads
        if batch.streams[stream].bits == 0:
            continue
        for token in range(first, after, TILE):
            store_tile(head, token, min(token + TILE, after), batch, stream, slots, pool, spaces)
