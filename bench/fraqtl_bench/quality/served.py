"""A format as it is served: the free slots of the newest block hold residuals, see `fraqtl_kernels.residual`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fraqtl_bench.quality.codecs import Codec
from fraqtl_bench.quality.grids import Kept
from fraqtl_bench.quality.recent import Recent
from fraqtl_bench.quality.server_codec import ServerStream
from fraqtl_kernels.formats import KVFormat
from fraqtl_kernels.residual import reads_residual, residual_positions

BLOCK_SIZE = 16
TOKENS = 2  # the dimension of tokens in what is kept


@dataclass(frozen=True)
class Served(Recent):
    """Tokens as `old`, and those that the newest query reads with their residuals as `new`: their sums.

    window: tokens of a block. `sequence_bits` counts residuals, though they lie in slots that a block has anyway.
    """

    old: ServerStream
    by_token: ClassVar[bool] = True

    def is_new(self, query: Tensor, key: Tensor) -> Tensor:
        return reads_residual(query, key, self.window)

    def counts(self, tokens: int) -> tuple[int, int]:
        return tokens, len(residual_positions(tokens, self.window))

    def states(self, x: Tensor, constants: Kept) -> tuple[Tensor, Tensor]:
        kept = self.old.encode(x.float(), constants)
        old = self.old.decode(kept, constants, x.shape[-1])
        residual = self.old.decode_residual(self.old.encode_residual(x.float(), kept, constants), constants)
        return old.to(x.dtype), (old + residual).to(x.dtype)

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        kept = self.old.encode(x, constants)
        residual = self.old.encode_residual(x, kept, constants)
        at = residual_positions(x.shape[-2], self.window).to(x.device)
        return kept | {f"residual {name}": field.index_select(TOKENS, at) for name, field in residual.items()}

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        x = self.old.decode(kept, constants, size)
        residual = {name: kept[f"residual {name}"] for name in ("codes", "scale")}
        at = residual_positions(x.shape[-2], self.window).to(x.device)
        return x.index_add(TOKENS, at, self.old.decode_residual(residual, constants))


def served_stream(format: KVFormat, name: str) -> Codec:
    """Keys or values ("key" or "value") of a format, with their residuals if they have any."""
    stream = ServerStream(format, name)
    return Served(stream, stream, BLOCK_SIZE) if stream.has_residual else stream
