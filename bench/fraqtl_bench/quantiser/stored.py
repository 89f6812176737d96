"""Keys and values through the code that the server runs: written into packed pages and read back."""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels import cpu, reference
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import KVFormat
from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE, PageLayout


def through_pages(format: KVFormat, key: Tensor, value: Tensor, constants: LayerConstants) -> tuple[Tensor, Tensor]:
    """key, value: (tokens, KV heads, D) floating point, as attention receives them. Returns what it reads instead."""
    tokens, heads, size = key.shape
    layout = PageLayout(format, size, BLOCK_SIZE_MULTIPLE)
    blocks = -(-tokens // layout.block_size)
    pool = torch.zeros(blocks, heads, layout.block_size, format.bytes_per_token(size), dtype=torch.uint8)
    cpu.write(pool, layout, key, value, torch.arange(tokens), constants)
    planes = layout.planes(pool)
    stored = reference.stored_keys(planes, format.k, constants), reference.stored_values(planes, format.v, constants)
    k, v = (x.transpose(1, 2).flatten(0, 1)[:tokens] for x in stored)
    return k.to(key.dtype), v.to(value.dtype)
