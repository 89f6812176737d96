"""Points of the grid, their inputs, and attention in float64 to compare with."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """Requests x cached tokens, query heads / KV heads, head size."""

    batch: int
    context: int
    query_heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`8x4096x32x8x128`: batch, context, query heads, KV heads, head size."""
        try:
            values = [int(part) for part in text.split("x")]
            return cls(*values)
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give batch x context x query heads x KV heads x head size, such as 8x4096x32x8x128"
            ) from None

    def check(self) -> None:
        """Raises ConfigError for heads that can't share keys."""
        if self.query_heads % self.kv_heads:
            raise ConfigError(f"{self}: the query heads must be a multiple of the KV heads")

    def bytes_read(self, bytes_per_token: float) -> int:
        """Bytes that one call must read of the cache; bytes_per_token: per (token, KV head), key and value."""
        return int(self.batch * self.context * self.kv_heads * bytes_per_token)

    @property
    def vectors(self) -> int:
        """Keys and values of all tokens."""
        return 2 * self.batch * self.context * self.kv_heads

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}x{self.query_heads}x{self.kv_heads}x{self.head_size}"


@dataclass(frozen=True)
class Inputs:
    """One fresh random set, the same for every arm.

    query: (batch, query heads, D). key, value: (batch, context, KV heads, D). order: a random permutation
    for arms that spread tokens over blocks, (batch, blocks a request).
    """

    shape: Shape
    block_size: int
    query: Tensor
    key: Tensor
    value: Tensor
    order: Tensor

    @classmethod
    def random(
        cls, shape: Shape, block_size: int, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape.batch, shape.context, shape.kv_heads, shape.head_size)
        blocks = shape.batch * -(-shape.context // block_size)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        return cls(
            shape,
            block_size,
            normal(shape.batch, shape.query_heads, shape.head_size),
            normal(*size),
            normal(*size),
            torch.randperm(blocks, generator=generator, device=device).view(shape.batch, -1).int(),
        )

    @property
    def scale(self) -> float:
        return float(self.shape.head_size**-0.5)

    def truth(self) -> Tensor:
        """(query heads, D) float64: attention of the first request, exact."""
        return exact_attention(self.query[0], self.key[0], self.value[0], self.scale)

    @property
    def blocks(self) -> int:
        return self.order.numel()

    def slots(self, request: int) -> Tensor:
        """(context,) where the tokens of a request lie: block · block size + offset."""
        token = torch.arange(self.shape.context, device=self.order.device)
        return self.order[request, token // self.block_size].long() * self.block_size + token % self.block_size


def exact_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · q k) v of one request in float64. query: (heads, D); key, value: (tokens, KV heads, D)."""
    heads, size = query.shape
    q = query.double().view(key.shape[1], -1, size)
    weights = (torch.einsum("hgd,thd->hgt", q, key.double()) * scale).softmax(-1)
    return torch.einsum("hgt,thd->hgd", weights, value.double()).reshape(heads, size)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖."""
    return float((out.double() - expected).norm() / expected.norm())
