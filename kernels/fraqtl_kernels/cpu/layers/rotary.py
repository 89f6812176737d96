"""Rotary position embedding of queries and keys, in place (Su et al., arXiv 2104.09864).

(x_i, x_j) <- (x_i cos - x_j sin, x_j cos + x_i sin) for pairs (i, i + R/2), or (2i, 2i + 1) where they are interleaved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import get_num_threads, njit, prange
from torch import Tensor

from fraqtl_kernels.cpu.layers.bits import FAST, bits_of, flat, from_float, to_float
from fraqtl_kernels.cpu.layers.norm import PARALLEL_NUMBERS


@njit(fastmath=FAST, cache=True, nogil=True)
def _rotate_token(x, heads, size, cosines, sines, interleaved):
    """x: (heads · size,) of one token. cosines, sines: (R / 2,) float32."""
    half = cosines.shape[0]
    for head in range(heads):
        if interleaved:
            pairs = x[head * size : head * size + 2 * half]
            for d in range(half):
                a, b = to_float(pairs[2 * d]), to_float(pairs[2 * d + 1])
                pairs[2 * d] = from_float(a * cosines[d] - b * sines[d], pairs[0])
                pairs[2 * d + 1] = from_float(b * cosines[d] + a * sines[d], pairs[0])
        else:
            low = x[head * size : head * size + half]
            high = x[head * size + half : head * size + 2 * half]
            for d in range(half):
                a, b = to_float(low[d]), to_float(high[d])
                low[d] = from_float(a * cosines[d] - b * sines[d], low[d])
                high[d] = from_float(b * cosines[d] + a * sines[d], high[d])


@njit(fastmath=FAST, cache=True, nogil=True)
def _rotate_both(token, positions, table, q, q_stride, q_heads, k, k_stride, k_heads, size, interleaved):
    """Of one token. table: (positions, R), cosines and then sines."""
    row = table[positions[token]]
    half = row.shape[0] // 2
    cosines, sines = np.empty(half, np.float32), np.empty(half, np.float32)
    for d in range(half):
        cosines[d] = to_float(row[d])
        sines[d] = to_float(row[half + d])
    _rotate_token(q[token * q_stride : token * q_stride + q_heads * size], q_heads, size, cosines, sines, interleaved)
    _rotate_token(k[token * k_stride : token * k_stride + k_heads * size], k_heads, size, cosines, sines, interleaved)


@njit(fastmath=FAST, cache=True, nogil=True)
def _rotate(positions, table, q, q_stride, q_heads, k, k_stride, k_heads, size, interleaved):
    for token in range(positions.shape[0]):
        _rotate_both(token, positions, table, q, q_stride, q_heads, k, k_stride, k_heads, size, interleaved)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _rotate_parallel(positions, table, q, q_stride, q_heads, k, k_stride, k_heads, size, interleaved):
    for token in prange(positions.shape[0]):
        _rotate_both(token, positions, table, q, q_stride, q_heads, k, k_stride, k_heads, size, interleaved)


class RotaryEmbedding:
    """The embedding of one layer.

    table: (positions, R) contiguous, cosines and then sines, R <= head_size even.
    """

    def __init__(self, table: Tensor, head_size: int, *, interleaved: bool) -> None:
        self._table: Any = bits_of(table.detach())
        self._size, self._interleaved = head_size, interleaved

    def __call__(self, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rotate in place. positions: (tokens,) int64. query, key: (tokens, heads · head_size), contiguous rows."""
        q, count, q_stride = flat(query)
        k, k_stride, k_heads = q[:0], 0, 0
        if key is not None:
            k, _, k_stride = flat(key)
            k_heads = key.shape[-1] // self._size
        small = count * query.shape[-1] < PARALLEL_NUMBERS or get_num_threads() == 1
        rotate = _rotate if small else _rotate_parallel
        heads = query.shape[-1] // self._size
        rotate(positions.numpy(), self._table, q, q_stride, heads, k, k_stride, k_heads, self._size, self._interleaved)
        return query, key
