"""How the vectors of one stream (the keys or the values of one layer) are stored, and at how many bits.

`fit` makes the constants from calibration vectors, `encode` what is kept of each vector, `decode`
the vectors again from those two alone. All measurements go through all three. `serialize` writes what is
kept as bytes; tests count them against `sequence_bits` and `all_constant_bits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fraqtl_bench.quality.bases import basis_bits, fit_basis, matrix
from fraqtl_bench.quality.grids import FP16_BITS, Grid, Kept
from fraqtl_kernels.calibration.importance import Importance
from fraqtl_kernels.errors import ConfigError


@dataclass(frozen=True)
class Rope:
    """The rotation of keys by their position. frequencies: (R/2,), radians a position, of the first R dimensions.

    halves: whether dimensions i and i + R/2 make a pair, as in Llama; otherwise neighbors do.
    """

    frequencies: Tensor
    halves: bool


@dataclass(frozen=True)
class LayerSample:
    """Calibration vectors of one layer: query (query heads, T, D), key and value (KV heads, T, D).

    importance: of its queries and values; None: all alike. gradient: of the text's loss, by stream, like key and value;
    None if no method asked for it. rope: how keys were rotated, None for not at all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    importance: Importance | None = None
    gradient: dict[str, Tensor] | None = None
    rope: Rope | None = None

    def stream(self, name: str) -> Tensor:
        """The vectors of stream "key" or "value"."""
        return self.key if name == "key" else self.value


class Codec(ABC):
    """Shapes: H KV heads, T tokens, D head size; `...` is the batch.

    needs_gradient: whether `fit` takes the sample's gradient.
    """

    needs_gradient: ClassVar[bool] = False

    @abstractmethod
    def fit(self, sample: LayerSample, stream: str) -> Kept:
        """Constants for a stream of the layer: (H, ...) each, or (1, ...) if all heads share one."""

    @abstractmethod
    def encode(self, x: Tensor, constants: Kept) -> Kept:
        """What is kept of vectors x (..., H, T, D) float32."""

    @abstractmethod
    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        """(..., H, T, D) float32 vectors of `size` dimensions."""

    @abstractmethod
    def vector_bits(self, size: int) -> int:
        """Bits kept per vector of `size` dimensions."""

    @abstractmethod
    def constant_bits(self, size: int, constants: Kept) -> int:
        """Bits of constants per KV head. `constants` only tells which of them there are."""

    def shared_token_bits(self, size: int) -> int:
        """Bits kept per token for all heads together."""
        return 0

    def shared_constant_bits(self, size: int, constants: Kept) -> int:
        """Bits of constants that all heads share."""
        return 0

    def token_bits(self, size: int, heads: int) -> int:
        """Bits that one more token takes in a long sequence, all heads together."""
        return heads * self.vector_bits(size) + self.shared_token_bits(size)

    def sequence_bits(self, size: int, heads: int, tokens: int) -> int:
        """Bits kept of a sequence, all heads together, without constants."""
        return tokens * self.token_bits(size, heads)

    def all_constant_bits(self, size: int, heads: int, constants: Kept) -> int:
        """Bits of all constants of the stream."""
        return heads * self.constant_bits(size, constants) + self.shared_constant_bits(size, constants)

    def check(self, size: int) -> None:  # noqa: B027 (most codecs take any size)
        """Raises ConfigError or UnsupportedError if vectors of `size` dimensions can't be stored so."""

    def round_trip(self, x: Tensor, constants: Kept) -> Tensor:
        """x (..., H, T, D) as the cache gives it back, in x's dtype."""
        return self.decode(self.encode(x.float(), constants), constants, x.shape[-1]).to(x.dtype)


class Exact(Codec):
    """fp16, as is."""

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        return {}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        return {"x": x.to(torch.float16)}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        return kept["x"].float()

    def vector_bits(self, size: int) -> int:
        return FP16_BITS * size

    def constant_bits(self, size: int, constants: Kept) -> int:
        return 0


@dataclass(frozen=True)
class Coordinates(Codec):
    """`rank` coordinates in a basis (None: all), on a grid.

    centered: the calibration mean is kept, subtracted first and added back. Methods that drop
    dimensions have it, or they would lose the mean of those with the rest.
    """

    basis: str
    grid: Grid
    rank: int | None = None
    centered: bool = False
    seed: int = 0

    def check(self, size: int) -> None:
        self.rank_of(size)

    def rank_of(self, size: int) -> int:
        """The rank at a head size. Raises ConfigError if it is above it."""
        rank = size if self.rank is None else self.rank
        if not 0 < rank <= size:
            raise ConfigError(f"rank {rank} is not possible at head size {size}: give 1 to {size}")
        return rank

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        x = sample.stream(stream).float()
        constants: Kept = {"mean": x.mean(-2).to(torch.float16)} if self.centered else {}
        constants |= fit_basis(self.basis, x, self.rank_of(x.shape[-1]), self.seed)
        return constants | self.grid.fit(self.project(x, constants))

    def project(self, x: Tensor, constants: Kept) -> Tensor:
        """The coordinates (..., H, T, rank) of x."""
        if self.centered:
            x = x - constants["mean"].float().unsqueeze(-2)
        return x @ matrix(self.basis, constants, x.shape[-1], x.device)

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        return self.grid.encode(self.project(x, constants), constants)

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        y = self.grid.decode(kept, constants, self.rank_of(size))
        x = y @ matrix(self.basis, constants, size, y.device).mT
        return x + constants["mean"].float().unsqueeze(-2) if self.centered else x

    def vector_bits(self, size: int) -> int:
        return self.grid.vector_bits(self.rank_of(size))

    def constant_bits(self, size: int, constants: Kept) -> int:
        rank = self.rank_of(size)
        mean = FP16_BITS * size if self.centered else 0
        return mean + basis_bits(self.basis, size, rank) + self.grid.constant_bits(rank)


def serialize(kept: Kept) -> bytes:
    """The bytes of what is kept, one tensor after another; names and shapes follow from the method."""
    parts = (kept[name].contiguous().cpu().view(-1).view(torch.uint8) for name in sorted(kept))
    return b"".join(part.numpy().tobytes() for part in parts)


def deserialize(data: bytes, like: Kept) -> Kept:
    """The inverse of `serialize`; `like` gives names, dtypes and shapes only."""
    found: Kept = {}
    at = 0
    for name in sorted(like):
        end = at + like[name].numel() * like[name].element_size()
        part = bytearray(data[at:end])
        flat = torch.frombuffer(part, dtype=like[name].dtype) if part else like[name].new_empty(0)
        found[name], at = flat.view(like[name].shape), end
    if at != len(data):
        raise ValueError(f"{len(data)} bytes given, {at} expected")
    return found
