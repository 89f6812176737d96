"""How a decode batch is cut into programs, on the host by upper bounds and on the device by real lengths.

The grid (requests, KV heads, splits) is fixed by what the host knows without asking the device:
the number of requests, the longest context it allows for, the number of multiprocessors. A CUDA
graph captured with it serves every batch of that many requests. Inside, every program derives from
the real lengths into how many pieces its request is cut (`kernels/splits.py`),

    pieces = own tiles / (tiles of the whole batch · KV heads / wanted programs), rounded,

at least MIN_TILES tiles each and no more than the grid has. Pieces of a request differ by a tile at most: none is left
with a stray tile, which would cost a program's start and a turn at the memory. Programs without a piece leave at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.gpu.constexprs import AttentionShape, rows_for
from fraqtl_kernels.gpu.kernels.prepared import TERMS
from fraqtl_kernels.gpu.tuned import tuned
from fraqtl_kernels.gpu.tuning import Tuning, decode_tuning
from fraqtl_kernels.pages import PageLayout

MAX_QUERIES = 8
SLACK = 2  # grid programs per wanted program, so that uneven lengths still split evenly
MAX_SPLITS = 128


class Batch(NamedTuple):
    """Queries and the pages that they attend, as `decode` and `prefill` take them."""

    query: Tensor
    pool: Tensor
    layout: PageLayout
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor


class Softmax(NamedTuple):
    """What a layer does to its scores, as on the CPU.

    window: keys that a query sees, None: all. soft_cap: None or 0: no cap. sink_logits: (query heads,) logarithms of
    what the sum of a query's weights has besides its keys, None: nothing.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def cap(self) -> float | None:
        """The soft cap as kernels take it."""
        return self.soft_cap or None

    @property
    def sees_centers(self) -> bool:
        """Whether weights depend on what all keys share."""
        return self.cap is not None or self.sink_logits is not None


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


def plan_decode(
    layout: PageLayout,
    *,
    requests: int,
    queries: int,
    query_heads: int,
    kv_heads: int,
    max_seq_len: int,
    num_sms: int,
    tuning: Tuning | None = None,
) -> DecodePlan:
    """The plan of a batch (or CUDA graph) of at most `requests`, each with at most `queries` query
    tokens (1 .. 8) and at most `max_seq_len` tokens in the cache. Looks at no device memory.
    """
    if not 1 <= queries <= MAX_QUERIES:
        raise UnsupportedError(f"decode takes 1 to {MAX_QUERIES} query tokens a request, not {queries}")
    if query_heads % kv_heads:
        raise UnsupportedError(f"{query_heads} query heads are not a multiple of {kv_heads} KV heads")
    rows = rows_for(queries * query_heads // kv_heads)
    tuning = tuning or tuned(layout, rows, requests * kv_heads) or decode_tuning(layout, rows)
    splits = choose_splits(requests, kv_heads, max_seq_len, tuning, num_sms)
    programs = tuning.programs_per_sm * num_sms
    return DecodePlan(requests, queries, query_heads, kv_heads, splits, programs, tuning)
