"""Codes in their bytes, as `pages.py` says, compiled: packed, and read as float32 numbers into a buffer where attention
doesn't read them as they are stored."""

from __future__ import annotations

import numpy as np
from numba import njit

from fraqtl_kernels.formats import TOP_BITS

# Not "ninf" and "nnan": hidden keys are -inf, and a NaN must come out as one.
FAST = {"reassoc", "contract", "arcp", "nsz"}


@njit(cache=True, nogil=True)
def are_direct(bits, groups, size):
    """Whether attention reads rows of `bits` with `groups` scales each as they are stored, and not as floats.

    Of 3 bits where the third bits of eight codes next to each other lie in eight bytes.
    """
    return groups <= 1 and bits != 2 and (bits != 3 or size % 64 == 0)


# One function a width: in one with branches, Numba keeps counting references to every slice, which costs more than the
# loops. Rows are sliced before their loop, because an index that might be negative keeps it from vectorizing.
@njit(fastmath=FAST, cache=True, nogil=True)
def _load_pairs(raw, start, count, size, tile):
    """`count` rows of 2-bit codes from byte `start` of the pool, as floats."""
    width = size // 4
    for n in range(count):
        codes, target = raw[start + n * width : start + (n + 1) * width], tile[n]
        for part in range(4):
            quarter = target[part * width : (part + 1) * width]
            for d in range(width):
                quarter[d] = np.float32((codes[d] >> (2 * part)) & 3)


@njit(fastmath=FAST, cache=True, nogil=True)
def _triple(lower, upper, at, top):
    """A code: two bits of `lower` from bit `at`, one of `upper`, bit `top`."""
    lower, upper = np.int32(lower) >> np.int32(at), np.int32(upper) >> np.int32(top)
    return np.float32((lower & np.int32(3)) | ((upper & np.int32(1)) << np.int32(2)))


@njit(fastmath=FAST, cache=True, nogil=True)
def _load_triples(raw, start, count, size, tile):
    """The same of 3-bit codes."""
    width, half = size // 4, size // 8
    for n in range(count):
        at, target = start + n * (width + half), tile[n]
        first, second = raw[at : at + half], raw[at + half : at + width]
        upper = raw[at + width : at + width + half]
        for part in range(4):
            quarter = target[part * width : (part + 1) * width]
            low, high = quarter[:half], quarter[half:]
            for d in range(half):
                low[d] = _triple(first[d], upper[d], 2 * part, TOP_BITS[part])
            for d in range(half):
                high[d] = _triple(second[d], upper[d], 2 * part, TOP_BITS[part] + 4)


@njit(fastmath=FAST, cache=True, nogil=True)
def _load_nibbles(raw, start, count, size, tile):
    """The same of 4-bit codes."""
    width = size // 2
    for n in range(count):
        codes, row = raw[start + n * width : start + (n + 1) * width], tile[n]
        lower, upper = row[:width], row[width:]
        for d in range(width):
            lower[d] = np.float32(np.int32(codes[d]) & np.int32(15))
        for d in range(width):
            upper[d] = np.float32(np.int32(codes[d]) >> np.int32(4))


@njit(fastmath=FAST, cache=True, nogil=True)
def _load_bytes(raw, start, count, size, tile):
    """The same of 8-bit codes."""
    codes, target = raw[start : start + count * size], tile.reshape(-1)
    for i in range(count * size):
        target[i] = np.float32(codes[i])


@njit(fastmath=FAST, cache=True, nogil=True)
def load_codes(raw, start, count, size, bits, tile):
    """`count` rows of what is stored from byte `start` of the pool as floats."""
    if bits == 4:
        _load_nibbles(raw, start, count, size, tile)
    elif bits == 2:
        _load_pairs(raw, start, count, size, tile)
    elif bits == 3:
        _load_triples(raw, start, count, size, tile)
    else:
        _load_bytes(raw, start, count, size, tile)


@njit(cache=True, nogil=True)
def pack_codes(codes, bits, target):
    """target <- the codes (D,) uint8 of one vector."""
    row = target.shape[0]
    if bits == 4:  # by itself, because this vectorizes
        low, high = codes[:row], codes[row:]
        for i in range(row):
            target[i] = low[i] | (high[i] << np.uint8(4))
        return
    if bits == 3:
        _pack_triples(codes, target)
        return
    for i in range(row):
        packed = codes[i]
        for j in range(1, 8 // bits):
            packed |= codes[j * row + i] << np.uint8(j * bits)
        target[i] = packed


@njit(cache=True, nogil=True)
def _pack_triples(codes, target):
    width, half = codes.shape[0] // 4, codes.shape[0] // 8
    lower, upper = target[:width], target[width:]
    for i in range(width):
        lower[i] = 0
    for i in range(half):
        upper[i] = 0
    for part in range(4):
        quarter = codes[part * width : (part + 1) * width]
        low, high = quarter[:half], quarter[half:]
        for i in range(width):
            lower[i] |= (quarter[i] & np.uint8(3)) << np.uint8(2 * part)
        for i in range(half):
            pair = (low[i] >> np.uint8(2)) | ((high[i] >> np.uint8(2)) << np.uint8(4))
            upper[i] |= pair << np.uint8(TOP_BITS[part])


@njit(fastmath=FAST, cache=True, nogil=True)
def scale_groups(raw16, half, start, count, size, groups, midpoint, tile):
    """Codes become numbers where a row has several scales: from byte `start` of the pool, `groups` a row."""
    width = size // groups
    for n in range(count):
        for group in range(groups):
            part = tile[n][group * width : (group + 1) * width]
            scale = half[raw16[start // 2 + n * groups + group]]
            for d in range(width):
                part[d] = (part[d] - midpoint) * scale


@njit(fastmath=FAST, cache=True, nogil=True)
def load_pages(pool, numbers, head, stream, count, tile):
    """tile <- the first `count` keys (stream 0) or values (stream 1) of pages. pool: `pages.Pool`."""
    pages, size = pool.pages[0], tile.shape[1]
    bits, groups, midpoint = pages.k_bits, pages.k_groups, pages.k_midpoint
    code_offset, scale_offset = np.int64(0), pages.k_scale_offset
    if stream == 1:
        bits, groups, midpoint = pages.v_bits, pages.v_groups, pages.v_midpoint
        code_offset, scale_offset = pages.v_offset, pages.v_scale_offset
    for i in range((count + pages.block_size - 1) // pages.block_size):
        page = np.int64(numbers[i]) * pages.block_stride + head * pages.head_stride
        rows, part = min(pages.block_size, count - i * pages.block_size), tile[i * pages.block_size :]
        load_codes(pool.raw, page + code_offset, rows, size, bits, part)
        if groups > 1:
            scale_groups(pool.raw16, pool.half, page + scale_offset, rows, size, groups, midpoint, part)
