"""turbo-attn at 4 bits.

Source: arbicity/turbo-attn 0.70.1 (PyPI), tkv/codec/_base.py, tkv/calibration/_scale_policy.py, tkv/codec/_scales.py,
tkv/kernels/loaders/ring.py. This is what it fits at start for a model that it ships no store for: Hadamard, a scale per
channel, levels from Lloyd's algorithm, one set a layer and stream. Left out, because its stores alone bring them: the
fitted rotation (OSCAR), the pairwise codebook (vq2), other bits by layer.

A vector is divided by its channels' scales. Its length is kept in bf16; its direction, rotated, is put on the levels.
Of keys the kept length is such that the decoded vector has the right one. The newest 128 tokens are also kept at 8
bits, each rotated vector with an fp32 scale, and read from there. Every token is decoded (see `recent`): in turbo-attn
a chunk of a prompt attends itself raw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import FP16_BITS, Kept, pack_bits, packed_bits, unpack_bits
from fraqtl_bench.quality.rivals.levels import fit_levels, nearest
from fraqtl_bench.quality.rivals.rotations import check_power_of_two, rotate

WINDOW = 128
FLOAT_BITS = 32
LEAST_EXPONENT = 1e-3


def channel_scales(own: Tensor, other: Tensor | None) -> Tensor:
    """(1, D): the scales of channels, from vectors (heads, T, D).

    The root mean square of each channel over the mean of all, to a power. other: the queries where `own` are keys;
    these share a scale in neighboring pairs. The power makes |q·s| |k/s| least if the channels of queries follow those
    of keys by a power law. Values, which meet no such vector, have 1/2.
    """
    size = own.float().square().mean((0, 1)).clamp_min(1e-12).sqrt()
    scale = (size / size.mean()).clamp_min(1e-6)
    power = 0.5
    if other is not None:
        scale = scale.unflatten(-1, (-1, 2)).log().mean(-1).exp().repeat_interleave(2)
        sizes = (size, other.float().square().mean((0, 1)).clamp_min(1e-12).sqrt())
        logs, of_other = (x.log() - x.log().mean() for x in sizes)
        slope = (logs @ of_other / (logs @ logs).clamp_min(1e-12)).item()
        power = min(1.0, max(LEAST_EXPONENT, (1 - slope) / 2))
    return (scale**power).unsqueeze(0)


@dataclass(frozen=True)
class Coded(Codec):
    """The codes. keeps_length: of keys."""

    bits: int
    keeps_length: bool

    def check(self, size: int) -> None:
        check_power_of_two("turbo-attn", size)

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        x = sample.stream(stream).float()
        scales = channel_scales(x, sample.query if stream == "key" else None)
        direction, _ = _split(x, scales)
        return {"levels": fit_levels(direction, 2**self.bits).unsqueeze(0), "scales": scales}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        direction, length = _split(x, constants["scales"])
        codes = nearest(direction, constants["levels"][0])
        if self.keeps_length:
            length = length / constants["levels"][0][codes.long()].norm(dim=-1).clamp_min(1e-10)
        return {"codes": pack_bits(codes, self.bits), "length": length.to(torch.bfloat16)}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        direction = constants["levels"][0][unpack_bits(kept["codes"], self.bits, size).long()]
        return _join(direction, kept["length"], constants["scales"])

    def vector_bits(self, size: int) -> int:
        return packed_bits(size, self.bits) + FP16_BITS

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0

    def shared_constant_bits(self, size: int, constants: Kept) -> int:
        return FLOAT_BITS * (size + 2**self.bits)


@dataclass(frozen=True)
class Int8(Codec):
    """The 8-bit copy of the newest tokens, with the constants of `Coded`."""

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        raise NotImplementedError("the codes bring the constants")

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        direction, length = _split(x, constants["scales"])
        rotated = direction * length.to(torch.bfloat16).float().unsqueeze(-1)
        step = rotated.abs().amax(-1) / 127
        codes = (rotated / step.unsqueeze(-1)).nan_to_num(0.0).round().to(torch.int8)
        return {"codes": codes, "step": step}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        return _join(kept["codes"].float(), kept["step"], constants["scales"])

    def vector_bits(self, size: int) -> int:
        return 8 * size + FLOAT_BITS

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0


def _split(x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The rotated direction and the length of x over the channels' scales."""
    scaled = x / scales
    length = scaled.norm(dim=-1).clamp_min(1e-10)
    return rotate(scaled / length.unsqueeze(-1), x.shape[-1]), length


def _join(rotated: Tensor, length: Tensor, scales: Tensor) -> Tensor:
    return rotate(rotated, rotated.shape[-1], back=True) * length.float().unsqueeze(-1) * scales
