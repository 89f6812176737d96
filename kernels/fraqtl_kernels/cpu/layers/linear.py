"""Linear layers with 16-bit weights on processors without 16-bit matrix units.

Up to `FEW_ROWS` rows (decode steps) take a compiled kernel that widens the weights in registers: it reads half the
bytes that float32 weights would have, and keeps no second copy of them. More rows (prompts) take float32 matrix
products over panels of the weights, widened into a scratch that stays in the cache. Sums are float32 throughout and
rounded once, so the result is at least as exact as a 16-bit product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from fraqtl_kernels.cpu.layers.bits import FAST, ZERO, bits_of, from_float, to_float

FEW_ROWS = 32
PANEL_BYTES = 1 << 20  # of widened weights: as much as a second-level cache holds
_COLUMNS = 32  # outputs that a thread takes at once


@njit(fastmath=FAST, cache=True, nogil=True)
def _dots(x, weight, row, column, y):
    """y[row, column] of one row and one column."""
    a, one, values = ZERO, weight[column], x[row]
    for k in range(values.shape[0]):
        a += values[k] * to_float(one[k])
    y[row, column] = a


@njit(fastmath=FAST, cache=True, nogil=True)
def _dots_1x4(x, weight, row, column, y):
    """Of one row and four columns."""
    a, b, c, d = ZERO, ZERO, ZERO, ZERO
    w_a, w_b, w_c, w_d = weight[column], weight[column + 1], weight[column + 2], weight[column + 3]
    values = x[row]
    for k in range(values.shape[0]):
        value = values[k]
        a += value * to_float(w_a[k])
        b += value * to_float(w_b[k])
        c += value * to_float(w_c[k])
        d += value * to_float(w_d[k])
    y[row, column], y[row, column + 1], y[row, column + 2], y[row, column + 3] = a, b, c, d


@njit(fastmath=FAST, cache=True, nogil=True)
def _dots_4x2(x, weight, row, column, y):
    """Of four rows and two columns."""
    a0, a1, a2, a3, b0, b1, b2, b3 = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    w_a, w_b = weight[column], weight[column + 1]
    x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
    for k in range(x0.shape[0]):
        a, b = to_float(w_a[k]), to_float(w_b[k])
        a0 += x0[k] * a
        a1 += x1[k] * a
        a2 += x2[k] * a
        a3 += x3[k] * a
        b0 += x0[k] * b
        b1 += x1[k] * b
        b2 += x2[k] * b
        b3 += x3[k] * b
    y[row, column], y[row + 1, column], y[row + 2, column], y[row + 3, column] = a0, a1, a2, a3
    y[row, column + 1], y[row + 1, column + 1], y[row + 2, column + 1], y[row + 3, column + 1] = b0, b1, b2, b3


@njit(fastmath=FAST, cache=True, nogil=True)
def _columns(x, weight, bias, begin, end, y, out):
    """Columns begin .. end - 1 of `_multiply`. y: (rows, N) float32 scratch."""
    rows = x.shape[0]
    fours, pairs, quads = rows // 4 * 4, begin + (end - begin) // 2 * 2, begin + (end - begin) // 4 * 4
    for row in range(0, fours, 4):
        for column in range(begin, pairs, 2):
            _dots_4x2(x, weight, row, column, y)
        for column in range(pairs, end):
            for n in range(4):
                _dots(x, weight, row + n, column, y)
    for row in range(fours, rows):
        for column in range(begin, quads, 4):
            _dots_1x4(x, weight, row, column, y)
        for column in range(quads, end):
            _dots(x, weight, row, column, y)
    for row in range(rows):
        target, sums = out[row], y[row]
        if bias.shape[0]:
            for column in range(begin, end):
                target[column] = from_float(sums[column] + bias[column], target[column])
        else:
            for column in range(begin, end):
                target[column] = from_float(sums[column], target[column])


@njit(fastmath=FAST, cache=True, nogil=True)
def _widen(source, target):
    """target <- source as float32. Both of one dimension."""
    for i in range(source.shape[0]):
        target[i] = to_float(source[i])


@njit(fastmath=FAST, cache=True, nogil=True)
def _multiply(x, weight, bias, out):
    """out <- x · weight^T + bias. x: (rows, K), weight: (N, K), out: (rows, N), bias: (N,) float32 or (0,)."""
    wide, y = np.empty(x.shape, np.float32), np.empty(out.shape, np.float32)
    for row in range(x.shape[0]):
        _widen(x[row], wide[row])
    _columns(wide, weight, bias, 0, weight.shape[0], y, out)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _multiply_parallel(x, weight, bias, out):
    """The same with all threads."""
    wide, y = np.empty(x.shape, np.float32), np.empty(out.shape, np.float32)
    for row in range(x.shape[0]):
        _widen(x[row], wide[row])
    columns = weight.shape[0]
    for part in prange((columns + _COLUMNS - 1) // _COLUMNS):
        _columns(wide, weight, bias, part * _COLUMNS, min(columns, part * _COLUMNS + _COLUMNS), y, out)


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _widen_parallel(source, target):
    for row in prange(source.shape[0]):
        _widen(source[row], target[row])


class WideLinear:
    """y = x W^T + b with float32 sums, for one layer.

    weight: (N, K) bfloat16 or float16, contiguous; kept as it is.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._bits = bits_of(self._weight)
        self._biases: dict[int, Any] = {}  # by address: a layer has one, float32 from its first use
        self._no_bias = np.empty(0, np.float32)
        self._panel = max(1, PANEL_BYTES // (4 * weight.shape[1]))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (..., K) in the dtype of the weight. Returns (..., N) in the same."""
        rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
        if len(rows) > FEW_ROWS:
            return self._by_panels(rows, bias).view(*x.shape[:-1], -1)
        if rows.stride(-1) != 1 or rows.stride(0) != rows.shape[1]:
            rows = rows.contiguous()
        out = torch.empty(len(rows), len(self._weight), dtype=x.dtype)
        multiply = _multiply if get_num_threads() == 1 else _multiply_parallel
        multiply(bits_of(rows), self._bits, self._wide_bias(bias), bits_of(out))
        return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)

    def _by_panels(self, x: Tensor, bias: Tensor | None) -> Tensor:
        wide = x.float()
        out = torch.empty(len(x), len(self._weight), dtype=x.dtype)
        scratch = torch.empty(self._panel, x.shape[1], dtype=torch.float32)
        for start in range(0, len(self._weight), self._panel):
            panel = scratch[: min(self._panel, len(self._weight) - start)]
            _widen_parallel(self._bits[start : start + len(panel)], panel.numpy())
            columns = slice(start, start + len(panel))
            if bias is None:
                out[:, columns] = wide @ panel.T
            else:
                out[:, columns] = torch.addmm(bias[columns].float(), wide, panel.T)
        return out

    def _wide_bias(self, bias: Tensor | None) -> Any:
        if bias is None:
            return self._no_bias
        if bias.data_ptr() not in self._biases:
            self._biases[bias.data_ptr()] = bias.detach().float().numpy()
        return self._biases[bias.data_ptr()]
