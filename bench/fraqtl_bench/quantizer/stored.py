"""Keys and values through the code that the server runs: written into packed pages and read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels import cpu, reference
from fraqtl_kernels.constants import LayerConstants, Transform
from fraqtl_kernels.cpu.residual import StreamResiduals
from fraqtl_kernels.formats import KVFormat, VectorFormat
from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE, PageLayout

BLOCK_SIZE = BLOCK_SIZE_MULTIPLE


@dataclass(frozen=True)
class Stored:
    """key, value: (tokens, KV heads, D), what attention reads instead of the exact ones. residual_key, residual_value:
    the same shape, what it adds to those that a query reads with their residuals; None: nothing."""

    key: Tensor
    value: Tensor
    residual_key: Tensor | None = None
    residual_value: Tensor | None = None


def through_pages(format: KVFormat, key: Tensor, value: Tensor, constants: LayerConstants) -> Stored:
    """key, value: (tokens, KV heads, D) floating point, as attention receives them."""
    tokens, heads, size = key.shape
    layout = PageLayout(format, size, BLOCK_SIZE)
    blocks = -(-tokens // layout.block_size)
    pool = torch.zeros(blocks, heads, layout.block_size, format.bytes_per_token(size), dtype=torch.uint8)
    residual = cpu.write(pool, layout, key, value, torch.arange(tokens), cpu.LayerOperands.of(layout, heads, constants))
    planes = layout.planes(pool)
    stored = reference.stored_keys(planes, format.k, constants), reference.stored_values(planes, format.v, constants)
    k, v = (x.transpose(1, 2).flatten(0, 1)[:tokens].to(key.dtype) for x in stored)
    if residual is None:
        return Stored(k, v)
    return Stored(
        k,
        v,
        _restored(residual.key, key, format.k, constants.key.transform),
        _restored(residual.value, value, format.v, constants.value.transform),
    )


def _restored(
    residual: StreamResiduals | None, like: Tensor, vector: VectorFormat, transform: Transform | None
) -> Tensor:
    if residual is None:
        return torch.zeros_like(like)
    return reference.restore_residual(residual.tokens, vector, transform).to(like.dtype)
