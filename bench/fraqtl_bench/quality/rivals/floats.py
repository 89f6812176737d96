"""Floats of 8 and 4 bits: vLLM's `fp8` and `nvfp4`.

fp8: vllm-project/vllm, vllm/model_executor/layers/quantization/kv_cache.py. It is e4m3, with scale 1 where the
checkpoint brings none.

nvfp4: flashinfer-ai/flashinfer, include/flashinfer/page.cuh, which vLLM calls on SM8x, SM90 and SM12x. It is e2m1 in
blocks of 16 along a vector. An e4m3 scale makes the largest magnitude of a block 6. An fp32 scale is the whole
tensor's: vLLM takes it from the checkpoint, or 1; here it follows NVFP4's usual rule, the largest magnitude of the
calibration text over 6 · 448.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import Kept, pack_bits, unpack_bits
from fraqtl_kernels.errors import UnsupportedError

BLOCK = 16
LARGEST_E4M3 = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_e4m3(x: Tensor) -> Tensor:
    """Nearest, ties to even; beyond the largest it is the largest, as on a GPU."""
    return x.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Fp8(Codec):
    """e4m3 with scale 1."""

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return {}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        return {"x": to_e4m3(x)}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        return kept["x"].float()

    def vector_bits(self, size: int) -> int:
        return 8 * size

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0


@dataclass(frozen=True)
class Nvfp4(Codec):
    """e2m1 in blocks of 16 with e4m3 scales."""

    def check(self, size: int) -> None:
        if size % BLOCK:
            raise UnsupportedError(f"nvfp4: blocks of {BLOCK} don't divide head size {size}")

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        largest = sample.stream(stream).float().abs().max() / (E2M1[-1] * LARGEST_E4M3)
        return {"scale": largest.clamp_min(torch.finfo(torch.float32).tiny).reshape(1)}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        blocks = x.unflatten(-1, (-1, BLOCK))
        scales = to_e4m3(blocks.abs().amax(-1) / (E2M1[-1] * constants["scale"]))
        step = (scales.float() * constants["scale"]).unsqueeze(-1)
        scaled = blocks * torch.where(step > 0, 1 / step, 0.0)
        codes = _e2m1(scaled.abs()) | (scaled.signbit().to(torch.uint8) << 3)
        return {"codes": pack_bits(codes.flatten(-2), 4), "scales": scales}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        codes = unpack_bits(kept["codes"], 4, size).long()
        values = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)[codes]
        step = kept["scales"].float() * constants["scale"]
        return (values.unflatten(-1, (-1, BLOCK)) * step.unsqueeze(-1)).flatten(-2)

    def vector_bits(self, size: int) -> int:
        return 4 * size + 8 * (size // BLOCK)

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0

    def shared_constant_bits(self, size: int, constants: Kept) -> int:
        return 32


def _e2m1(magnitudes: Tensor) -> Tensor:
    """The nearest codes, of two equally near ones the even one."""
    levels = torch.tensor(E2M1, device=magnitudes.device)
    between = (levels[1:] + levels[:-1]) / 2
    between[1::2] = between[1::2].nextafter(torch.zeros_like(between[1::2]))  # these go up: the code above is even
    return torch.bucketize(magnitudes.contiguous(), between).to(torch.uint8)
