"""Encode and store the keys and values of a batch on the CPU, compiled: by heads and tiles of tokens.

The formulas are those of `reference.encode_keys` and `encode_values`. A tile is TILE tokens of one head, or fewer: its
vectors are multiplied by the basis together (`products.py`), then each is rounded by itself (`calibrated.py`,
`plain.py`). Nothing is added up across vectors, and every sum has one order, so a vector's bytes never depend on what
else is in its batch.
"""

from __future__ import annotations

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
def _choose_center(z, at, size, table, shift, other):
    """z[at : at + size] <- the vector with the outlier center in place of its own where its scale is smaller then.

    shift: where in `table` the way between the centers begins, in the basis. other: (size,) spare. Returns the sign
    bit.
    """
    for d in range(0, size, WIDTH):
        store(other, d, load(z, at + d) - load(table, shift + d))
    edge = np.float32(8)
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


@njit(cache=True, nogil=True)
def store_tile(head, first, last, arrays, whole, numbers, slots, pool, raw16, places, spaces):
    """Tokens first .. last - 1 of one head. See `store_range`; arrays: those of one side."""
    table, residual, hadamard_base = arrays
    address, kind, token_stride, head_stride = whole[0], whole[1], whole[2], whole[3]
    bits, groups, calibrated, structured, shifted = whole[4], whole[5], whole[6] == 1, whole[7] == 1, whole[8] == 1
    code_offset, code_bytes, scale_offset, scale_bytes = whole[10], whole[11], whole[12], whole[13]
    distance, is_kept = whole[14], whole[15] == 1
    numbers = (numbers[0], numbers[1], numbers[2], numbers[3])
    block_size, block_stride, page_stride, heads, size = places
    x, z, spare, scales, code_at, token_of, signs, codes = spaces
    tokens = slots.shape[0]
    center = head * whole[9] if calibrated else -1
    count = 0
    for token in range(first, last):
        slot = slots[token]
        if slot < 0:
            for d in range(size if is_kept else 0):
                residual[(token * heads + head) * size + d] = np.float32(0)
            continue
        place = address + token * token_stride + head * head_stride
        _load_vector(place, kind, table, center, x, count * size, size)
        page = (slot // block_size) * block_stride + head * page_stride
        code_at[count] = page + code_offset + (slot % block_size) * code_bytes
        token_of[count] = token
        signs[count] = 0
        count += 1
    if calibrated:
        matrix = center + 2 * size
        multiply(x, count, size, table, matrix, z)
        if shifted:
            for t in range(count):
                signs[t] = _choose_center(z, t * size, size, table, center + size, x)
        encode(z, count, size, table, matrix + size * size, structured, spare, pool, code_at, scales)
    for t in range(count):
        token = token_of[t]
        slot = slots[token]
        offset = slot % block_size
        page = (slot // block_size) * block_stride + head * page_stride
        scale_at = page + scale_offset + offset * scale_bytes
        if calibrated:
            raw16[scale_at // 2] = np.uint16(half_bits(scales[t]) | signs[t])
        else:
            row = x[t * size : (t + 1) * size]
            if hadamard_base.shape[0]:
                rotate(row, z, hadamard_base)
                for d in range(size):
                    row[d] *= numbers[3]
            encode_plain(row, codes, bits, groups, numbers, pool, raw16, code_at[t], scale_at)
        residual_at = (token * heads + head) * size if is_kept else -1
        if distance == 0 or offset + distance >= block_size:
            for d in range(size if is_kept else 0):
                residual[residual_at + d] = np.float32(0)
            continue
        residual_code_at, residual_scale_at = code_at[t] + distance * code_bytes, scale_at + distance * scale_bytes
        if token + distance < tokens and slots[token + distance] == slot + distance:
            residual_code_at = -1  # a token of this batch goes there
        if residual_code_at < 0 and residual_at < 0:
            continue
        if calibrated:
            scale = encode_residual(z, t * size, size, pool, residual_code_at, residual, residual_at)
            if residual_code_at >= 0:
                raw16[residual_scale_at // 2] = np.uint16(half_bits(scale))
        else:
            row = x[t * size : (t + 1) * size]
            encode_plain_residual(
                row,
                codes,
                bits,
                groups,
                numbers,
                pool,
                raw16,
                residual_code_at,
                residual_scale_at,
                residual,
                residual_at,
            )


@njit(cache=True, nogil=True)
def store_range(begin, end, tables, residual, hadamard_bases, whole, numbers, slots, pool, places):
    """Encode tiles begin .. end - 1 of a batch's tokens into its slots, and residuals into those behind them.

    Head by head, so that the matrices of one stay in the cache, first the keys. tables .. numbers: `operands.join`; a
    side without scales of its own is left out here. slots: (tokens,) int64, negative: skip. pool: its bytes, (n,) uint8
    of an even n, from the first page on. places: block size, bytes from block to block and from head to head, heads, D.
    """
    heads, size = places[3], places[4]
    first, after = begin * TILE, min(end * TILE, slots.shape[0])
    raw16 = pool.view(np.uint16)
    spaces = make_spaces(min(TILE, after - first + ROWS - 1), size)  # `multiply` works on whole ROWS
    for item in range(2 * heads):
        stream, head = item // heads, item % heads
        if whole[stream, 4] == 0:
            continue
        arrays = tables[stream], residual[stream], hadamard_bases[stream]
        for token in range(first, after, TILE):
            last = min(token + TILE, after)
            store_tile(head, token, last, arrays, whole[stream], numbers[stream], slots, pool, raw16, places, spaces)
