"""Codes of formats that attention doesn't read as they are stored, as float32 numbers in a buffer, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit

# Not "ninf" and "nnan": hidden keys are -inf, and a NaN must come out as one.
FAST = {"reassoc", "contract", "arcp", "nsz"}


@njit(cache=True, nogil=True)
def are_direct(bits, groups):
    """Whether attention reads rows of `bits` with `groups` scales each as they are stored, and not as floats."""
    return groups <= 1 and bits != 2


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
    else:
        _load_bytes(raw, start, count, size, tile)


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
