"""Codes of formats that attention doesn't read as they are stored, as float32 numbers in a buffer, compiled."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

# Not "ninf" and "nnan": hidden keys are -inf, and a NaN must come out as one.
FAST = {"reassoc", "contract", "arcp", "nsz"}


@cache
def half_table() -> Any:
    """The float32 value of every fp16 bit pattern: 256 KiB, one look-up a scale."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).float().numpy()


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
def load_pages(raw, raw16, half, numbers, head, sizes, stream, midpoints, count, tile):
    """tile <- the first `count` keys (stream 0) or values (stream 1) of pages. sizes: of `decode.attend_run`."""
    block_size, bits, groups, size = sizes[0], sizes[1 + stream], sizes[3 + stream], tile.shape[1]
    for i in range((count + block_size - 1) // block_size):
        page = np.int64(numbers[i]) * sizes[5] + head * sizes[6]
        rows, part = min(block_size, count - i * block_size), tile[i * block_size :]
        load_codes(raw, page + stream * sizes[7], rows, size, bits, part)
        if groups > 1:
            scale_groups(raw16, half, page + sizes[8 + stream], rows, size, groups, midpoints[stream], part)
