"""Codes of one vector without feedback on the CPU, compiled: the rotation, `reference.quantize`, and residuals.

Vectors with calibrated centers come rotated already.

The rotation is H = S ⊗ B of `rotation.py`, with S of Sylvester's doubling: log2 |S| rounds of sums and differences and
|B| products a number, in place of D products.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fraqtl_kernels.cpu.kernels.calibrated import scale_of
from fraqtl_kernels.cpu.kernels.codes import pack_codes
from fraqtl_kernels.cpu.kernels.lanes import half_bits

_FAST = {"reassoc", "contract", "nsz"}  # not "nnan": NaN must stay NaN


@njit(fastmath=_FAST, cache=True, nogil=True)
def rotate(x, spare, hadamard_base):
    """x <- x · H · sqrt(D), in place. spare: as many numbers as B has rows."""
    size, width = x.shape[0], hadamard_base.shape[0]
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
            row, value = hadamard_base[i], x[start + i]
            for j in range(width):
                spare[j] += value * row[j]
        for j in range(width):
            x[start + j] = spare[j]


@njit(fastmath=_FAST, cache=True, nogil=True)
def _scale_of(x, edge):
    """max|x| / edge in fp16; NaN if x holds NaN or infinity."""
    most, broken = np.float32(0), np.float32(0)
    for d in range(x.shape[0]):
        most = max(most, abs(x[d]))
        broken += x[d] * np.float32(0)
    return scale_of(most, edge) if broken == broken else np.float32(np.nan)


@njit(fastmath=_FAST, cache=True, nogil=True, error_model="numpy")
def _codes_of(x, scale, midpoint, levels, codes):
    """codes <- clamp(round(x / scale + midpoint), 0, levels), zero where that is no number."""
    for d in range(x.shape[0]):
        step = np.rint(x[d] / scale + midpoint)
        step = min(max(step, np.float32(0)), levels) if step == step else np.float32(0)
        codes[d] = np.uint8(step)


@njit(fastmath=_FAST, cache=True, nogil=True)
def encode_plain(x, codes, bits, groups, numbers, raw, raw16, code_at, scale_at):
    """Store the codes and scales of x (D,), and leave in its place what they left of it. codes: (D,) uint8, spare."""
    edge, midpoint, levels = numbers
    size = x.shape[0]
    width = size // groups
    for group in range(groups):
        part, part_codes = x[group * width : (group + 1) * width], codes[group * width : (group + 1) * width]
        scale = _scale_of(part, edge)
        raw16[scale_at // 2 + group] = np.uint16(half_bits(scale))
        _codes_of(part, scale, midpoint, levels, part_codes)
        for d in range(width):
            part[d] -= (np.float32(part_codes[d]) - midpoint) * scale
    pack_codes(codes, bits, raw[code_at : code_at + size * bits // 8])


@njit(fastmath=_FAST, cache=True, nogil=True)
def encode_plain_residual(x, codes, bits, groups, numbers, raw, raw16, code_at, scale_at, residual, residual_at):
    """Code what `encode_plain` left of x. To the pool unless code_at < 0, and to `residual` unless residual_at < 0."""
    edge, midpoint, levels = numbers
    size = x.shape[0]
    width = size // groups
    for group in range(groups):
        part, part_codes = x[group * width : (group + 1) * width], codes[group * width : (group + 1) * width]
        scale = _scale_of(part, edge)
        _codes_of(part, scale, midpoint, levels, part_codes)
        if code_at >= 0:
            raw16[scale_at // 2 + group] = np.uint16(half_bits(scale))
        if residual_at >= 0:
            target = residual[residual_at + group * width : residual_at + (group + 1) * width]
            for d in range(width):
                target[d] = (np.float32(part_codes[d]) - midpoint) * scale
    if code_at >= 0:
        pack_codes(codes, bits, raw[code_at : code_at + size * bits // 8])
