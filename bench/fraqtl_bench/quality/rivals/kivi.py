"""KIVI with 2 or 4 bits.

Source: Z. Liu et al., KIVI (arXiv 2402.02750, ICML 2024); jy-yuan/KIVI, quant/new_pack.py and models/llama_kivi.py,
with group_size 32 and residual_length 128.

Evenly spaced levels between the least and the largest of a group; the least and the step in fp16. Groups of keys (after
RoPE): one channel over 32 tokens. Groups of values: 32 channels of one token. The newest tokens stay fp16: keys until
128 of them are there, which then are coded at once; of values always 128. Every token is decoded (see `recent`): KIVI
attends a prompt raw, so a score of a prompt would show no loss at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import FP16_BITS, Kept, pack_bits, unpack_bits
from fraqtl_kernels.errors import UnsupportedError

GROUP = 32
RESIDUAL = 128


@dataclass(frozen=True)
class Groups(Codec):
    """Groups along the tokens (keys) or the channels (values). The tokens of keys come in whole groups."""

    bits: int
    along_tokens: bool

    def check(self, size: int) -> None:
        if not self.along_tokens and size % GROUP:
            raise UnsupportedError(f"kivi: groups of {GROUP} channels don't divide head size {size}")

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return {}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        if self.along_tokens:
            x = x.mT.contiguous()
        groups = x.unflatten(-1, (x.shape[-1] // GROUP, GROUP))
        least = groups.amin(-1, keepdim=True)
        step = ((groups.amax(-1, keepdim=True) - least) / (2**self.bits - 1)).to(torch.float16)
        least = least.to(torch.float16)
        codes = ((groups - least.float()) / step.float()).nan_to_num(0.0).clamp(0, 2**self.bits - 1).round()
        packed = pack_bits(codes.to(torch.uint8), self.bits)
        return {"codes": packed, "ends": torch.cat([step, least], -1)}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        step, least = kept["ends"].float().unsqueeze(-2).unbind(-1)
        x = (unpack_bits(kept["codes"], self.bits, GROUP).float() * step + least).flatten(-2)
        return x.mT if self.along_tokens else x

    def vector_bits(self, size: int) -> int:
        return self.bits * size + 2 * FP16_BITS * size // GROUP

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0
