"""llama.cpp's `q8_0` and `q4_0`: blocks of 32 values with an fp16 scale each.

Source: ggml-org/llama.cpp, `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` in ggml/src/ggml-quants.c; the rotation:
`build_input_k_rot` and `build_input_v_rot` in src/llama-kv-cache.cpp, pull request 21038.

Caches of these types are rotated by default where 64 divides the head size: keys (after RoPE) by the largest Hadamard
matrix whose order is a power of two that divides it, values by one of order 64. `-plain` is LLAMA_ATTN_ROT_DISABLE=1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import Kept
from fraqtl_bench.quality.rivals.rotations import rotate
from fraqtl_kernels.errors import UnsupportedError

BLOCK = 32
LEAST_ROTATION = 64
_BYTES = {4: 2 + BLOCK // 2, 8: 2 + BLOCK}


@dataclass(frozen=True)
class Blocks(Codec):
    """What is kept has ggml's own bytes: the scale, then the codes. rotation: "none", "largest" or "least"."""

    bits: int
    rotation: str

    def check(self, size: int) -> None:
        if size % BLOCK:
            raise UnsupportedError(f"q{self.bits}_0: blocks of {BLOCK} don't divide head size {size}")

    def order(self, size: int) -> int:
        """Of the Hadamard matrices, 1 for none."""
        if self.rotation == "none" or size % LEAST_ROTATION:
            return 1
        return LEAST_ROTATION if self.rotation == "least" else size & -size

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return {}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        blocks = rotate(x, self.order(x.shape[-1])).unflatten(-1, (-1, BLOCK))
        scale, codes = _q8(blocks) if self.bits == 8 else _q4(blocks)
        kept = torch.cat([scale.to(torch.float16).view(torch.uint8), codes], -1)
        return {"blocks": kept.flatten(-2)}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        blocks = kept["blocks"].unflatten(-1, (-1, _BYTES[self.bits]))
        scale = blocks[..., :2].contiguous().view(torch.float16).float()
        codes = blocks[..., 2:]
        if self.bits == 8:
            values = codes.view(torch.int8).float()
        else:
            values = torch.cat([codes & 15, codes >> 4], -1).float() - 8
        return rotate((values * scale).flatten(-2), self.order(size), back=True)

    def vector_bits(self, size: int) -> int:
        return 8 * _BYTES[self.bits] * (size // BLOCK)

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0


def _q8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (..., 1) and a byte per code: the largest magnitude becomes 127."""
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = _over(blocks, scale)
    codes = scaled.sign() * (scaled.abs() + 0.5).floor()  # away from zero, as roundf does
    return scale, codes.to(torch.int8).view(torch.uint8)


def _q4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (..., 1), and codes i and i + 16 of a block in a byte: the value of largest magnitude becomes -8."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = (_over(blocks, scale) + 8.5).clamp(0, 15.5).to(torch.uint8)
    return scale, codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale as ggml does it: times the reciprocal, 0 where the scale is 0."""
    return x * torch.where(scale == 0, 0.0, 1 / scale)
