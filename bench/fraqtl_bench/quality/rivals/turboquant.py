"""vLLM's `turboquant_4bit_nc` and `turboquant_3bit_nc`.

Source: A. Zandieh et al., TurboQuant (arXiv 2504.19874), as vllm-project/vllm serves it: vllm/model_executor/layers/
quantization/turboquant/config.py, vllm/v1/attention/ops/triton_turboquant_store.py and triton_turboquant_decode.py.

Keys (after RoPE): the length in fp16; the direction, rotated by Hadamard, on the levels of least squared error for a
normal variable, one set for all; read back with length 1 (`nc`). Values: not rotated, evenly spaced levels between the
least and the largest of each vector, both ends in fp16. The paper's second stage, QJL, is left out there and here.
Every token is decoded: in vLLM the first chunk of a prompt attends itself raw.

By default vLLM keeps the first two and the last two layers of dense models in 16 bits: `-ends` does so too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import FP16_BITS, Kept, pack_bits, packed_bits, unpack_bits
from fraqtl_bench.quality.rivals.levels import nearest, normal_levels
from fraqtl_bench.quality.rivals.rotations import check_power_of_two, rotate

ENDS = 2
LEAST_STEP = 1e-8


@dataclass(frozen=True)
class Keys(Codec):
    bits: int

    def check(self, size: int) -> None:
        check_power_of_two("turboquant", size)

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return {}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        size = x.shape[-1]
        length = x.norm(dim=-1)
        rotated = rotate(x / (length.unsqueeze(-1) + 1e-8), size)
        codes = nearest(rotated * size**0.5, normal_levels(self.bits).to(x.device))
        return {"codes": pack_bits(codes, self.bits), "length": length.to(torch.float16)}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        codes = unpack_bits(kept["codes"], self.bits, size).long()
        direction = torch.nn.functional.normalize(normal_levels(self.bits).to(codes.device)[codes], dim=-1)
        return rotate(direction, size, back=True) * kept["length"].float().unsqueeze(-1)

    def vector_bits(self, size: int) -> int:
        return packed_bits(size, self.bits) + FP16_BITS

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0


@dataclass(frozen=True)
class Values(Codec):
    bits: int

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return {}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        least = x.amin(-1, keepdim=True)
        step = ((x.amax(-1, keepdim=True) - least) / (2**self.bits - 1)).clamp_min(LEAST_STEP)
        codes = ((x - least) / step + 0.5).floor().clamp(0, 2**self.bits - 1)
        ends = torch.cat([step, least], -1).to(torch.float16)
        return {"codes": pack_bits(codes.to(torch.uint8), self.bits), "ends": ends}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        step, least = kept["ends"].float().unsqueeze(-2).unbind(-1)
        return unpack_bits(kept["codes"], self.bits, size).float() * step + least

    def vector_bits(self, size: int) -> int:
        return packed_bits(size, self.bits) + 2 * FP16_BITS

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0
