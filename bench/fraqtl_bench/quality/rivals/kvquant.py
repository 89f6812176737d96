"""KVQuant's nuq4 and nuq3 without its sparse outliers.

Source: C. Hooper et al., KVQuant (arXiv 2401.18079, NeurIPS 2024); SqueezeAILab/KVQuant,
quant/kvquant/simquant_module_quantizer.py.

Both streams are scaled to -1 .. 1 and put on 2^b levels, one set a layer and stream. The levels come from k-means over
the calibration text with the squared gradients of its loss as weights (the paper's Fisher information). Keys are scaled
per channel, before RoPE: the cache hands them over after it, so they are turned back by their position, and forth again
when they are read. Ranges of channels come from calibration; values have one range a token, all heads together. A range
is its middle and half its width in fp16.

The frequencies of RoPE are counted as constants, though a model has them anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample, Rope
from fraqtl_bench.quality.grids import FP16_BITS, Kept, pack_bits, packed_bits, unpack_bits
from fraqtl_bench.quality.rivals.levels import fit_levels, nearest
from fraqtl_kernels.errors import UnsupportedError

LEVEL_BITS = 32


def turn(x: Tensor, frequencies: Tensor, *, back: bool = False) -> Tensor:
    """x (..., T, D) at positions 0, 1, ..: RoPE, or out of it. frequencies: (R/2,) of the pairs (i, i + R/2)."""
    half = len(frequencies)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
    cos, sin = angle.cos(), -angle.sin() if back else angle.sin()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@dataclass(frozen=True)
class Nuq(Codec):
    """What keys and values have in common: the levels."""

    bits: int
    needs_gradient: ClassVar[bool] = True

    def _levels(self, scaled: Tensor, gradient: Tensor | None) -> Tensor:
        weights = None if gradient is None else gradient.float().square()
        return fit_levels(scaled, 2**self.bits, weights).unsqueeze(0)

    def _codes(self, x: Tensor, middle: Tensor, width: Tensor, levels: Tensor) -> Tensor:
        scaled = ((x - middle.float()) / width.float()).nan_to_num(0.0)
        return pack_bits(nearest(scaled, levels[0]), self.bits)

    def _read(self, codes: Tensor, middle: Tensor, width: Tensor, levels: Tensor, size: int) -> Tensor:
        return levels[0][unpack_bits(codes, self.bits, size).long()] * width.float() + middle.float()

    def vector_bits(self, size: int) -> int:
        return packed_bits(size, self.bits)

    def shared_constant_bits(self, size: int, constants: Kept) -> int:
        return LEVEL_BITS * 2**self.bits


def _range(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The middle and half the width over `dims`, fp16, on a new last dimension."""
    least, most = x.amin(dims), x.amax(dims)
    return torch.stack([(most + least) / 2, (most - least) / 2], -1).to(torch.float16)


class Keys(Nuq):
    def fit(self, sample: LayerSample, stream: str) -> Kept:
        constants = _rope(sample.rope)
        key = self._raw(sample.key.float(), constants)
        gradient = None if sample.gradient is None else self._raw(sample.gradient["key"].float(), constants)
        ranges = _range(key, -2)
        middle, width = (r.float().unsqueeze(-2) for r in ranges.unbind(-1))
        scaled = ((key - middle) / width).nan_to_num(0.0)
        return constants | {"ranges": ranges, "levels": self._levels(scaled, gradient)}

    def _raw(self, x: Tensor, constants: Kept) -> Tensor:
        """x before RoPE."""
        return turn(x, constants["rope"][0], back=True) if "rope" in constants else x

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        middle, width = constants["ranges"].unsqueeze(-3).unbind(-1)
        return {"codes": self._codes(self._raw(x, constants), middle, width, constants["levels"])}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        middle, width = constants["ranges"].unsqueeze(-3).unbind(-1)
        x = self._read(kept["codes"], middle, width, constants["levels"], size)
        return turn(x, constants["rope"][0]) if "rope" in constants else x

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 2 * FP16_BITS * size

    def shared_constant_bits(self, size: int, constants: Kept) -> int:
        rope = LEVEL_BITS * constants["rope"].numel() if "rope" in constants else 0
        return super().shared_constant_bits(size, constants) + rope


class Values(Nuq):
    def fit(self, sample: LayerSample, stream: str) -> Kept:
        value = sample.value.float()
        middle, width = (r.float() for r in _range(value, (-3, -1))[..., None, :, None, :].unbind(-1))
        gradient = None if sample.gradient is None else sample.gradient["value"]
        return {"levels": self._levels(((value - middle) / width).nan_to_num(0.0), gradient)}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        ranges = _range(x, (-3, -1))
        middle, width = ranges[..., None, :, None, :].unbind(-1)
        return {"codes": self._codes(x, middle, width, constants["levels"]), "ranges": ranges}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        middle, width = kept["ranges"][..., None, :, None, :].unbind(-1)
        return self._read(kept["codes"], middle, width, constants["levels"], size)

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0

    def shared_token_bits(self, size: int) -> int:
        return 2 * FP16_BITS


def _rope(rope: Rope | None) -> Kept:
    if rope is None:
        return {}
    if not rope.halves:
        raise UnsupportedError("kvquant: keys are turned back only where RoPE pairs dimensions i and i + R/2")
    return {"rope": rope.frequencies.float().unsqueeze(0)}
