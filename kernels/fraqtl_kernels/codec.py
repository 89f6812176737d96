"""Codes, their bytes and their meaning in torch, as the kernels' surroundings use them.

What it must do is said again, in other words, by `reference.py`, which nothing in production imports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import TOP_BITS, VectorFormat
from fraqtl_kernels.rotation import hadamard


def quantize_static(x: Tensor, step: Tensor | None, vector: VectorFormat) -> Tensor:
    """Codes (..., KV heads, D) uint8 on the symmetric grid with a step for every channel.

    x: (..., KV heads, D) float32. step: (KV heads, D). What lies beyond the grid is clipped to its end; NaN becomes
    zero. Raises ConfigError without steps: calibration finds them.
    """
    if step is None:
        raise ConfigError("a format with static scales needs calibration: leave calibration on")
    steps = (x / step.to(x) + vector.midpoint).nan_to_num(vector.midpoint, vector.levels, 1)
    return steps.round().clamp(1, vector.levels).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, vector: VectorFormat) -> Tensor:
    """(..., D) codes and scales (...), or (..., groups), -> (..., D) values: (code - midpoint) · |scale|."""
    scale = scale.float().abs()
    steps = codes.float() - vector.midpoint
    if vector.groups == 1:
        return steps * scale.unsqueeze(-1)
    return (steps.unflatten(-1, (vector.groups, -1)) * scale.unsqueeze(-1)).flatten(-2)


def pack(codes: Tensor, vector: VectorFormat) -> Tensor:
    """(..., D) codes -> (..., code bytes), as `pages.py` says."""
    if vector.bits != 3:
        return _pack(codes, vector.bits)
    quarters = (codes >> 2).unflatten(-1, (4, 2, -1))  # (quarter, half of it, dimension)
    upper = quarters[..., TOP_BITS, :, :].transpose(-2, -3).flatten(-3)
    return torch.cat([_pack(codes & 3, 2), _pack(upper, 1)], -1)


def unpack(packed: Tensor, vector: VectorFormat) -> Tensor:
    """The inverse of `pack`."""
    if vector.bits != 3:
        return _unpack(packed, vector.bits)
    lower, upper = packed.split([packed.shape[-1] * 2 // 3, packed.shape[-1] // 3], -1)
    upper = _unpack(upper, 1).unflatten(-1, (2, 4, -1))[..., TOP_BITS, :].transpose(-2, -3).flatten(-3)
    return _unpack(lower, 2) | (upper << 2)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Part j of the dimensions in bits j·b .. j·b+b-1."""
    parts = codes.chunk(8 // bits, -1)
    packed = parts[0].clone()
    for j, part in enumerate(parts[1:], 1):
        packed |= part << (j * bits)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.cat([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1)


def rotate(x: Tensor, vector: VectorFormat) -> Tensor:
    """x (..., D) in the basis in which `vector` is stored, in x's dtype."""
    return x @ hadamard(x.shape[-1]).to(x) if vector.rotated else x


def unrotate(x: Tensor, vector: VectorFormat) -> Tensor:
    """The inverse of `rotate`."""
    return x @ hadamard(x.shape[-1]).to(x).T if vector.rotated else x
