"""Root-mean-square normalization, and the addition to the residual stream in front of it, in one pass over the rows.

y = x / sqrt(mean(x²) + eps) · w, in float32 throughout and rounded once (Zhang and Sennrich, arXiv 1910.07467).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from fraqtl_kernels.cpu.layers.bits import FAST, ZERO, bits_of, flat, from_float, to_float

PARALLEL_NUMBERS = 1 << 15  # fewer are done before other threads have woken up


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _norm_row(x, weight, gain, epsilon, out):
    """out <- the norm of x times (weight + gain). weight: (D,), or (0,) for none. x and out may be one."""
    size = x.shape[0]
    total = ZERO
    for d in range(size):
        value = to_float(x[d])
        total += value * value
    factor = np.float32(1) / np.sqrt(total / np.float32(size) + epsilon)
    if weight.shape[0]:
        for d in range(size):
            out[d] = from_float(to_float(x[d]) * factor * (to_float(weight[d]) + gain), out[d])
    else:
        for d in range(size):
            out[d] = from_float(to_float(x[d]) * factor, out[d])


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _add_and_norm_row(x, residual, weight, gain, epsilon, wide):
    """residual <- x + residual, x <- the norm of that before it was rounded. wide: (D,) float32 scratch."""
    size = x.shape[0]
    total = ZERO
    for d in range(size):
        value = to_float(x[d]) + to_float(residual[d])
        wide[d] = value
        total += value * value
    for d in range(size):
        residual[d] = from_float(wide[d], residual[d])
    factor = np.float32(1) / np.sqrt(total / np.float32(size) + epsilon)
    if weight.shape[0]:
        for d in range(size):
            x[d] = from_float(wide[d] * factor * (to_float(weight[d]) + gain), x[d])
    else:
        for d in range(size):
            x[d] = from_float(wide[d] * factor, x[d])


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _norm(x, stride, count, size, weight, gain, epsilon, out):
    for row in range(count):
        _norm_row(x[row * stride : row * stride + size], weight, gain, epsilon, out[row * size : (row + 1) * size])


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _norm_parallel(x, stride, count, size, weight, gain, epsilon, out):
    for row in prange(count):
        _norm_row(x[row * stride : row * stride + size], weight, gain, epsilon, out[row * size : (row + 1) * size])


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _add_and_norm(x, residual, count, size, weight, gain, epsilon):
    wide = np.empty(size, np.float32)
    for row in range(count):
        place = slice(row * size, (row + 1) * size)
        _add_and_norm_row(x[place], residual[place], weight, gain, epsilon, wide)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _add_and_norm_parallel(x, residual, count, size, weight, gain, epsilon):
    for row in prange(count):
        wide = np.empty(size, np.float32)
        place = slice(row * size, (row + 1) * size)
        _add_and_norm_row(x[place], residual[place], weight, gain, epsilon, wide)


class RMSNorm:
    """The norm of one layer.

    weight: (D,) in any dtype of `bits.DTYPES`, or None. gain: what is added to it (1 for Gemma's). in_place: whether
    a call with a residual overwrites both.
    """

    def __init__(self, weight: Tensor | None, epsilon: float, *, gain: float = 0.0, in_place: bool = False) -> None:
        self._weight: Any = bits_of(torch.empty(0, dtype=torch.float32) if weight is None else weight.detach())
        self._gain, self._epsilon = np.float32(gain), np.float32(epsilon)
        self._in_place = in_place

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x: (..., D). The norm of x; with a residual, alike in shape and dtype, the norm of the sum, and the sum."""
        small = x.numel() < PARALLEL_NUMBERS or get_num_threads() == 1
        size = x.shape[-1]
        if residual is None:
            rows = x if x.stride(-1) == 1 and (x.dim() == 2 or _is_matrix(x)) else x.contiguous()
            out = torch.empty(x.shape, dtype=x.dtype)
            bits, count, stride = flat(rows)
            norm = _norm if small else _norm_parallel
            norm(bits, stride, count, size, self._weight, self._gain, self._epsilon, bits_of(out.view(-1)))
            return out
        if self._in_place:
            x, residual = x.contiguous(), residual.contiguous()
        else:
            x, residual = (t.clone(memory_format=torch.contiguous_format) for t in (x, residual))
        add = _add_and_norm if small else _add_and_norm_parallel
        numbers, sums = bits_of(x.view(-1)), bits_of(residual.view(-1))
        add(numbers, sums, x.numel() // size, size, self._weight, self._gain, self._epsilon)
        return x, residual


def _is_matrix(x: Tensor) -> bool:
    """Whether the leading dimensions of x can be taken as one without a copy."""
    return all(x.stride(d) == x.stride(d + 1) * x.shape[d + 1] for d in range(x.dim() - 2))
