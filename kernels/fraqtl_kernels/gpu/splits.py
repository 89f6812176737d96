"""How a decode batch is cut into programs, on the host by upper bounds and on the device by real lengths.

The grid (requests, KV heads, splits) is fixed by what the host knows without asking the device:
the number of requests, the longest context it allows for, the number of multiprocessors. A CUDA
graph captured with it serves every batch of that many requests. Inside, every program derives from
the real lengths into how many pieces its request is cut,

    pieces = own tiles / (tiles of the whole batch · KV heads / wanted programs), rounded,

at least MIN_TILES tiles each and no more than the grid has. Pieces of a request differ by a tile at most: none is left
with a stray tile, which would cost a program's start and a turn at the memory. Programs without a piece leave at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.gpu.config import AttentionShape, Tuning

SLACK = 2  # grid programs per wanted program, so that uneven lengths still split evenly
MAX_SPLITS = 128
TERMS = tl.constexpr(3)  # of a prepared query: zero points · sum(q), q·center, q·shift


class ScratchViews(NamedTuple):
    """What the launches of a decode step leave one another, flat, in this order for the alignment.

    partial: outputs by split and query row. prepared: queries of the transposed form, 16 bits a number. terms: TERMS
    for each of them. lse: log-sums by split and query row.
    """

    partial: Tensor
    prepared: Tensor
    terms: Tensor
    lse: Tensor


@dataclass(frozen=True)
class DecodePlan:
    """Launch shape of one decode batch, made from host numbers only.

    requests, queries: the most requests and query tokens a request of the batch (or of the graph).
    splits: programs along the context. programs: how many are wanted at once.
    """

    requests: int
    queries: int
    query_heads: int
    kv_heads: int
    splits: int
    programs: int
    tuning: Tuning

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def shape(self) -> AttentionShape:
        tuning = self.tuning
        return AttentionShape(
            self.queries,
            self.group,
            tuning.tile,
            tuning.stages,
            HAS_RESIDUAL=self.queries == 1,
            MIN_TILES=tuning.min_tiles,
            TRANSPOSED=tuning.transposed,
        )

    def scratch_floats(self, head_size: int) -> int:
        """fp32 numbers of scratch that `decode` needs: see `ScratchViews`."""
        return sum(self._scratch_parts(head_size))

    def _scratch_parts(self, head_size: int) -> tuple[int, int, int, int]:
        """fp32 numbers of each of `ScratchViews`."""
        transposed = self.tuning.transposed
        rows = self.requests * self.query_heads * self.queries * self.splits if self.splits > 1 or transposed else 0
        columns = self.requests * self.kv_heads * self.shape.COLUMNS if transposed else 0
        return rows * head_size, columns * head_size // 2, columns * TERMS.value, rows

    def scratch_views(self, scratch: Tensor | None, head_size: int) -> ScratchViews | None:
        """The caller's scratch, cut; None if none is needed. Raises ValueError if it is too small."""
        parts = self._scratch_parts(head_size)
        if not sum(parts):
            return None
        if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < sum(parts):
            raise ValueError(f"decode needs {sum(parts)} fp32 numbers of scratch for {self.splits} splits")
        return ScratchViews(*scratch.view(-1)[: sum(parts)].split(parts))


def choose_splits(requests: int, kv_heads: int, max_seq_len: int, tuning: Tuning, num_sms: int) -> int:
    """Programs along the context for a batch of at most `requests` of at most `max_seq_len` tokens."""
    wanted = tuning.programs_per_sm * num_sms * SLACK
    chunks = triton.cdiv(max_seq_len, tuning.tile * tuning.min_tiles)
    return max(1, min(wanted // (requests * kv_heads), chunks, MAX_SPLITS))


@triton.jit
def oldest_visible(length, count, window):
    """The first token that the first of the last `count` query tokens sees. window: None sees everything."""
    oldest = length * 0
    if window is not None:
        oldest = tl.maximum(length - count - window + 1, 0)
    return oldest


@triton.jit
def count_pieces(
    first, length, seq_lens, query_start, requests, kv_heads, splits, programs, window, SHAPE: tl.constexpr
):
    """(pieces of a request that sees [first, length), its tiles). first: a multiple of TILE."""
    TILE: tl.constexpr = SHAPE.TILE
    total = first * 0
    for start in range(0, requests, 256):
        r = start + tl.arange(0, 256)
        n = tl.load(seq_lens + r, mask=r < requests, other=0).to(tl.int32)
        if window is not None:
            count = tl.load(query_start + r + 1, mask=r < requests, other=0)
            count -= tl.load(query_start + r, mask=r < requests, other=0)
            n = tl.minimum(n, count.to(tl.int32) + window + TILE)
        total += tl.sum((n + TILE - 1) // TILE, 0).to(total.dtype)
    own = tl.cdiv(length - first, TILE)
    whole = tl.maximum(total * kv_heads, 1)
    pieces = (2 * own.to(tl.int64) * programs + whole) // (2 * whole)
    pieces = tl.minimum(pieces.to(tl.int32), tl.minimum(own // SHAPE.MIN_TILES, splits))
    return tl.maximum(pieces, 1), own


@triton.jit
def piece_start(index, pieces, own):
    """The tiles before one of the pieces of a request of `own` tiles."""
    return (own.to(tl.int64) * index // pieces).to(tl.int32)
