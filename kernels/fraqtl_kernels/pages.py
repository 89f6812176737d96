"""Page-plane layout: what lies where inside the page of one (block, KV head).

    ┌────────────────────┬────────────────────┬──────────────┬──────────────┐
    │ K codes            │ V codes            │ K scales     │ V scales     │
    │ N × code bytes     │ N × code bytes     │ N × 2        │ N × 2        │
    └────────────────────┴────────────────────┴──────────────┴──────────────┘

N tokens a block, N a multiple of 16, so every plane starts at a multiple of 16 bytes of the page and no scale lies
inside a row of codes. A 4-bit row holds dimensions 0 .. D/2-1 in its low nibbles and D/2 .. D-1 in its high nibbles;
byte i of a 2-bit row holds dimensions i, i + D/4, i + D/2 and i + 3D/4, the first in its lowest bits. A 3-bit row is a
2-bit row of the lower two bits of all codes and, behind it, D/8 bytes of third bits: byte i holds in its low half those
of dimensions i, i + D/2, i + D/4 and i + 3D/4, the first in its lowest bit, and in its high half those of the
dimensions D/8 further on. A vector in G groups has G scales side by side: its plane of scales has N × 2G bytes. Raw and
static formats have the first two planes only. Behind the planes of head size 512 a few bytes stay unused, see
`KVFormat.bytes_per_token`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import SCALE_DTYPE, KVFormat, VectorFormat, check_head_size

BLOCK_SIZE_MULTIPLE = 16


@dataclass(frozen=True)
class Planes:
    """Views into the pool: writing them writes the pages.

    k, v: (blocks, heads, N, code bytes) uint8, or (blocks, heads, N, D) in the raw dtype.
    k_scale, v_scale: (blocks, heads, N) fp16, (blocks, heads, N, groups) for vectors in groups, None
    for raw and static ones. The sign of a key's scale is a flag, see `constants.py`.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of the planes of one page."""

    format: KVFormat
    head_size: int
    block_size: int

    def __post_init__(self) -> None:
        check_head_size(self.head_size)
        if self.block_size % BLOCK_SIZE_MULTIPLE:
            raise UnsupportedError(f"block size {self.block_size} is not a multiple of {BLOCK_SIZE_MULTIPLE}")

    @property
    def page_bytes(self) -> int:
        return self.block_size * self.format.bytes_per_token(self.head_size)

    @property
    def v_offset(self) -> int:
        return self.block_size * self.format.k.code_bytes(self.head_size)

    @property
    def k_scale_offset(self) -> int:
        return self.v_offset + self.block_size * self.format.v.code_bytes(self.head_size)

    @property
    def v_scale_offset(self) -> int:
        return self.k_scale_offset + self.block_size * self.format.k.scale_bytes

    def planes(self, pool: Tensor) -> Planes:
        """The planes of a pool view of vLLM's shape.

        pool: (blocks, heads, N, bytes per token) uint8, any block and head stride (padded pages
        are fine), but the [N, bytes] of one page contiguous. Raises ValueError otherwise.
        """
        blocks, heads, tokens, width = pool.shape
        if tokens * width != self.page_bytes or pool.dtype != torch.uint8:
            raise ValueError(f"pool {tuple(pool.shape)} {pool.dtype} does not hold pages of {self.page_bytes} bytes")
        if pool.stride(3) != 1 or pool.stride(2) != width:
            raise ValueError(f"the page of a block and head must be contiguous, its strides are {pool.stride()}")
        page = pool.as_strided((blocks, heads, self.page_bytes), (pool.stride(0), pool.stride(1), 1))
        return Planes(
            k=self._codes(page, self.format.k, 0),
            v=self._codes(page, self.format.v, self.v_offset),
            k_scale=self._scales(page, self.format.k, self.k_scale_offset),
            v_scale=self._scales(page, self.format.v, self.v_scale_offset),
        )

    def _codes(self, page: Tensor, vector: VectorFormat, offset: int) -> Tensor:
        width = vector.code_bytes(self.head_size)
        plane = page[..., offset : offset + self.block_size * width].unflatten(-1, (self.block_size, width))
        return plane if vector.raw_dtype is None else plane.view(vector.raw_dtype)

    def _scales(self, page: Tensor, vector: VectorFormat, offset: int) -> Tensor | None:
        if not vector.scale_bytes:
            return None
        scales = page[..., offset : offset + self.block_size * vector.scale_bytes].view(SCALE_DTYPE)
        return scales if vector.groups == 1 else scales.unflatten(-1, (self.block_size, vector.groups))
