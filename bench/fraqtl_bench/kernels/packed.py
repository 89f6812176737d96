"""What the arms over packed pages share, on either device: their constants, and what their pages hold."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fraqtl_bench.kernels.shapes import Inputs
from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.formats import KVFormat
from fraqtl_kernels.pages import PageLayout

SAMPLE = 512  # tokens that calibration sees


@cache
def sample_constants(format: KVFormat, head_size: int, kv_heads: int, query_heads: int) -> LayerConstants:
    """Constants of a format for random inputs, calibrated once: all inputs have the same distribution."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, SAMPLE, kv_heads, head_size, generator=generator).unbind()
    return calibrate(format, key, torch.randn(SAMPLE, query_heads, head_size, generator=generator), value)


def stored_values(
    pool: Tensor, layout: PageLayout, inputs: Inputs, constants: LayerConstants = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Keys and values of the first request as its last token reads them: (context, KV heads, D) float64, on the
    device of the pool: a CPU takes half a minute for 32k tokens."""
    pages, constants = pool[inputs.order[0].long()], constants.to(pool.device)
    planes = layout.planes(pages)
    key = reference.stored_keys(planes, layout.format.k, constants)
    value = reference.stored_values(planes, layout.format.v, constants)
    tokens = [x.transpose(1, 2).flatten(0, 1)[: inputs.shape.context] for x in (key, value)]
    table = torch.arange(len(pages), device=pool.device)
    residual = reference.page_residuals(pages, layout, table, inputs.shape.context, constants)
    return tokens[0] + residual[0], tokens[1] + residual[1]
