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
def _dot(x, weight):
    total = ZERO
    for k in range(x.shape[0]):
        total += x[k] * to_float(weight[k])
    return total


@njit(fastmath=FAST, cache=True, nogil=True)
def _four_dots(x, row, weight):
    """Of rows row .. row + 3."""
    a, b, c, d = ZERO, ZERO, ZERO, ZERO
    x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
    for k in range(x0.shape[0]):
        value = to_float(weight[k])
        a += x0[k] * value
        b += x1[k] * value
        c += x2[k] * value
        d += x3[k] * value
    return a, b, c, d


# One row of weights after another: what the processor fetches ahead is then just what comes next. Four rows at once
# halve the speed of a single token.
@njit(fastmath=FAST, cache=True, nogil=True)
def _columns(x, weight, bias, begin, end, y, out):
    """Columns begin .. end - 1 of `_multiply`. y: (rows, N) float32 scratch."""
    rows = x.shape[0]
    fours = rows // 4 * 4
    for column in range(begin, end):
        of_column = weight[column]
        for row in range(0, fours, 4):
            y[row, column], y[row + 1, column], y[row + 2, column], y[row + 3, column] = _four_dots(x, row, of_column)
        for row in range(fours, rows):
            y[row, column] = _dot(x[row], of_column)
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
