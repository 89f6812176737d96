"""Linear layers with MXFP4 weights (OCP Microscaling Formats 1.0), which stay packed in memory.

A weight is a 4-bit float (sign, two bits of exponent, one of mantissa), and 32 of them beside each other share a power
of two. Panels of weights become float32 in a scratch that stays in the cache, for products with any number of rows.
Sums are float32 and rounded once.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from fraqtl_kernels.cpu.layers.linear import PANEL_BYTES

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""By code."""
SCALES = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""By byte: 2^(byte - 127); the last byte stands for NaN."""


@njit(cache=True, nogil=True)
def _widen_row(codes, scales, target):
    """target (K,) float32 <- codes (K / 2,) with the even weight in the low half of a byte, scales (K / 32,)."""
    for block in range(scales.shape[0]):
        scale = SCALES[scales[block]]
        of_block = codes[block * 16 : block * 16 + 16]
        into = target[block * 32 : block * 32 + 32]
        for i in range(16):
            into[2 * i] = VALUES[of_block[i] & 15] * scale
            into[2 * i + 1] = VALUES[of_block[i] >> 4] * scale


@njit(parallel=True, cache=True, nogil=True)
def _widen(codes, scales, target):
    for row in prange(codes.shape[0]):
        _widen_row(codes[row], scales[row], target[row])


class MXFP4Linear:
    """y = x W^T + b for one layer.

    codes: (N, K / 2) uint8, two weights a byte, the even one in the low half. scales: (N, K / 32) uint8. Both
    contiguous and kept as they are.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._codes, self._scales = codes.detach().numpy(), scales.detach().numpy()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (rows, K). Returns (rows, N) in its dtype. bias: (N,)."""
        wide = x.float()
        outputs, inputs = len(self._codes), x.shape[1]
        out = torch.empty(len(x), outputs, dtype=x.dtype)
        scratch = torch.empty(max(1, PANEL_BYTES // (4 * inputs)), inputs, dtype=torch.float32)
        for start in range(0, outputs, len(scratch)):
            columns = slice(start, min(start + len(scratch), outputs))
            panel = scratch[: columns.stop - start]
            _widen(self._codes[columns], self._scales[columns], panel.numpy())
            if bias is None:
                out[:, columns] = wide @ panel.T
            else:
                out[:, columns] = torch.addmm(bias[columns].float(), wide, panel.T)
        return out
