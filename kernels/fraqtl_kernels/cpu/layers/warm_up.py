"""The layers' kernels compiled, or loaded from Numba's cache on disk, before a request would have to wait for them."""

from __future__ import annotations

import torch

from fraqtl_kernels.cpu.layers.gate import SILU, gate
from fraqtl_kernels.cpu.layers.linear import FEW_ROWS, WideLinear
from fraqtl_kernels.cpu.layers.norm import PARALLEL_NUMBERS, RMSNorm
from fraqtl_kernels.cpu.layers.rotary import RotaryEmbedding

_WIDTH = 64


def warm_up_layers(dtype: torch.dtype = torch.bfloat16) -> None:
    """For a model in `dtype`, with few tokens and with many."""
    weight = torch.zeros(_WIDTH, _WIDTH, dtype=dtype)
    for rows in (1, FEW_ROWS + 1, PARALLEL_NUMBERS // _WIDTH + 1):
        x = torch.zeros(rows, _WIDTH, dtype=dtype)
        norm = RMSNorm(weight[0], 1e-6, in_place=True)
        norm(x)
        norm(x, x.clone())
        gate(torch.cat([x, x], -1), SILU)
        RotaryEmbedding(weight, _WIDTH, interleaved=False)(torch.zeros(rows, dtype=torch.int64), x, x.clone())
        if dtype != torch.float32:
            WideLinear(weight)(x)
