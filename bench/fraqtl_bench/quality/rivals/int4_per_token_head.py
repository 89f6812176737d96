"""vLLM's `--kv-cache-dtype int4_per_token_head`.

Source: vllm-project/vllm, vllm/v1/attention/ops/int4_per_token_head.py, pull request 40835.

Keys (after RoPE) and values alike: random signs, a Hadamard rotation, 4 bits between the least and the largest of each
vector. The rotation's order is the largest power of two that divides the head size; every run of so many dimensions is
rotated. The fp32 scale has the zero point in its four lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import Kept, pack_bits, unpack_bits
from fraqtl_bench.quality.rivals.rotations import rotate, signs

SEED = 0x9E3779B9  # of vLLM's signs
LEAST_SCALE = 1e-6
_ZERO_POINT = 15  # the bits of the scale that hold it


@dataclass(frozen=True)
class Int4PerTokenHead(Codec):
    """A vector of D values takes D / 2 + 4 bytes."""

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return {}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        order = _order(x.shape[-1])
        y = rotate(_flip(x, order), order) * order**0.5  # vLLM's matrix has entries ±1
        least, most = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        scale = ((most - least) / 15).clamp_min(LEAST_SCALE)
        zero = _round(-least / scale).clamp(0, 15)
        codes = _round(y * (1 / scale) + zero).clamp(0, 15)
        packed = (scale.view(torch.int32) & ~_ZERO_POINT) | zero.to(torch.int32)
        return {"codes": pack_bits(codes.to(torch.uint8), 4), "scale": packed[..., 0].view(torch.float32)}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        bits = kept["scale"].contiguous().view(torch.int32).unsqueeze(-1)
        scale, zero = (bits & ~_ZERO_POINT).view(torch.float32), (bits & _ZERO_POINT).float()
        y = (unpack_bits(kept["codes"], 4, size).float() - zero) * scale
        order = _order(size)
        return _flip(rotate(y, order, back=True) / order**0.5, order)

    def vector_bits(self, size: int) -> int:
        return 4 * size + 32

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0


def _order(size: int) -> int:
    return size & -size


def _flip(x: Tensor, order: int) -> Tensor:
    """The same signs for every run of `order` dimensions."""
    return x * signs(order, SEED).repeat(x.shape[-1] // order).to(x.device)


def _round(x: Tensor) -> Tensor:
    """Halves away from zero."""
    return x.sign() * (x.abs() + 0.5).floor()
