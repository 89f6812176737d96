"""What pages hold, as float32 numbers in a buffer that stays in the first-level cache, compiled."""

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


# One function a width: in one with branches, Numba keeps counting references to every slice, which costs more than the
# loops. Rows are sliced before their loop, because an index that might be negative keeps it from vectorising.
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
def _load_bfloat16(raw16, start, count, size, tile_bits):
    """`count` rows of bfloat16 from byte `start` of the pool, as the bits of floats."""
    words, target = raw16[start // 2 : start // 2 + count * size], tile_bits.reshape(-1)
    for i in range(count * size):
        target[i] = np.int32(words[i]) << 16


@njit(fastmath=FAST, cache=True, nogil=True)
def _load_float16(raw16, half, start, count, size, tile):
    """`count` rows of float16 from byte `start` of the pool, as floats."""
    words, target = raw16[start // 2 : start // 2 + count * size], tile.reshape(-1)
    for i in range(count * size):
        target[i] = half[words[i]]


@njit(fastmath=FAST, cache=True, nogil=True)
def load_codes(raw, raw16, half, start, count, size, bits, tile, tile_bits):
    """`count` rows of what is stored from byte `start` of the pool as floats; bits 16: bfloat16, 17: float16."""
    if bits == 4:
        _load_nibbles(raw, start, count, size, tile)
    elif bits == 2:
        _load_pairs(raw, start, count, size, tile)
    elif bits == 8:
        _load_bytes(raw, start, count, size, tile)
    elif bits == 16:
        _load_bfloat16(raw16, start, count, size, tile_bits)
    else:
        _load_float16(raw16, half, start, count, size, tile)


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
def load_scales(raw16, start, count, words, floats, scales):
    """`count` fp16 scales from byte `start` of the pool as floats, their signs left out. floats: words' bits as floats.

    Exponent and mantissa in their places of a float32, times 2^112 for the difference of the exponents' biases.
    """
    halves = raw16[start // 2 : start // 2 + count]
    for n in range(count):
        words[n] = np.int32(halves[n] & 0x7FFF) << 13
    for n in range(count):
        scales[n] = floats[n] * np.float32(2.0**112) if floats[n] < np.float32(2.0**-96) else np.float32(np.nan)
