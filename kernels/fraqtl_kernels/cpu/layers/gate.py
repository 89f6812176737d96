"""Gated activations: act(x[:d]) · x[d:], in float32 and rounded once (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from fraqtl_kernels.cpu.layers.bits import FAST, bits_of, exp, from_float, to_float
from fraqtl_kernels.cpu.layers.norm import PARALLEL_NUMBERS

SILU, GELU_TANH = 0, 1


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _gate_row(x, kind, out):
    """out: (d,). x: (2d,)."""
    size = out.shape[0]
    gate, up = x[:size], x[size : 2 * size]
    if kind == SILU:
        for d in range(size):
            a = to_float(gate[d])
            out[d] = from_float(a / (np.float32(1) + exp(-a)) * to_float(up[d]), out[d])
    else:
        for d in range(size):
            a = to_float(gate[d])
            # (1 + tanh(t)) / 2 = 1 / (1 + e^-2t)
            t = np.float32(0.7978845608028654) * (a + np.float32(0.044715) * a * a * a)
            out[d] = from_float(a / (np.float32(1) + exp(np.float32(-2) * t)) * to_float(up[d]), out[d])


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _gate(x, kind, out):
    for row in range(out.shape[0]):
        _gate_row(x[row], kind, out[row])


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _gate_parallel(x, kind, out):
    for row in prange(out.shape[0]):
        _gate_row(x[row], kind, out[row])


def gate(x: Tensor, kind: int) -> Tensor:
    """x: (..., 2d) -> (..., d). kind: SILU or GELU_TANH."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype)
    target = out.view(-1, out.shape[-1])
    small = out.numel() < PARALLEL_NUMBERS or get_num_threads() == 1
    (_gate if small else _gate_parallel)(bits_of(rows), kind, bits_of(target))
    return out
