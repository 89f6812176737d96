"""Grids that coordinates are put on, and the packing of their codes.

A grid keeps a coordinate in b bits. The symmetric one has the codes -m .. m with m = 2^(b-1) - 1 and
a step of max|y| / m in fp16, either per channel (static: from calibration, values beyond it are
clipped) or per token (from the vector itself). With b = 2 that leaves three levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.errors import one_of

Kept = dict[str, Tensor]
FP16_BITS = 16
SCALES = ("channel", "token")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(..., n) uint8 codes below 2^bits -> (..., ceil(n · bits / 8)) uint8 without gaps."""
    if bits == 8:
        return codes
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=codes.device)
    return (stream.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: (..., n) uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : n * bits].unflatten(-1, (n, bits))
    weights = torch.tensor([1 << i for i in range(bits)], dtype=torch.uint8, device=packed.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def packed_bits(n: int, bits: int) -> int:
    """Bits that n packed codes take, the last byte filled up."""
    return -(-n * bits // 8) * 8


class Float16:
    """Coordinates kept as fp16."""

    bits = FP16_BITS

    def fit(self, y: Tensor) -> Kept:
        return {}

    def encode(self, y: Tensor, constants: Kept) -> Kept:
        return {"coordinates": y.to(torch.float16)}

    def decode(self, kept: Kept, constants: Kept, n: int) -> Tensor:
        return kept["coordinates"].float()

    def vector_bits(self, n: int) -> int:
        return FP16_BITS * n

    def constant_bits(self, n: int) -> int:
        return 0


@dataclass(frozen=True)
class Symmetric:
    """The symmetric grid of this module's docstring."""

    bits: int
    scale: str

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise one_of("scale", self.scale, SCALES)

    @property
    def largest(self) -> int:
        """The largest code m."""
        return (1 << (self.bits - 1)) - 1

    def _step(self, y: Tensor, axis: int) -> Tensor:
        return (y.abs().amax(axis) / self.largest).clamp_max(torch.finfo(torch.float16).max).to(torch.float16)

    def fit(self, y: Tensor) -> Kept:
        """y (H, T, n) -> the channels' steps (H, n), or nothing to keep if every token has its own."""
        return {"step": self._step(y, -2)} if self.scale == "channel" else {}

    def encode(self, y: Tensor, constants: Kept) -> Kept:
        """y (..., H, T, n) -> packed codes (..., H, T, bytes), and steps (..., H, T) if per token."""
        if self.scale == "channel":
            return {"codes": self._codes(y, constants["step"].float().unsqueeze(-2))}
        step = self._step(y, -1)
        return {"codes": self._codes(y, step.float().unsqueeze(-1)), "step": step}

    def _codes(self, y: Tensor, step: Tensor) -> Tensor:
        codes = (y / step).nan_to_num(0.0).round().clamp(-self.largest, self.largest)
        return pack_bits((codes + self.largest).to(torch.uint8), self.bits)

    def decode(self, kept: Kept, constants: Kept, n: int) -> Tensor:
        codes = unpack_bits(kept["codes"], self.bits, n).float() - self.largest
        if self.scale == "channel":
            return codes * constants["step"].float().unsqueeze(-2)
        return codes * kept["step"].float().unsqueeze(-1)

    def vector_bits(self, n: int) -> int:
        return packed_bits(n, self.bits) + (FP16_BITS if self.scale == "token" else 0)

    def constant_bits(self, n: int) -> int:
        return FP16_BITS * n if self.scale == "channel" else 0


Grid = Float16 | Symmetric
