"""What a step attends: its requests, sorted by how many query tokens they have, and the runs of blocks they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import get_num_threads
from torch import Tensor

RUN_TOKENS = 512  # no run of blocks is shorter than this, unless the context is
RUNS_PER_THREAD = 4


class Softmax(NamedTuple):
    """What a layer does to its scores.

    window: keys that a query sees, None: all. soft_cap: None: no cap. sink_logits: (query heads,) logarithms of what
    the sum of a query's weights has besides its keys, None: nothing.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def limits(self) -> tuple[int, Any]:
        """Window and soft cap as compiled loops take them: 0 where there is none."""
        return self.window or 0, np.float32(self.soft_cap or 0)

    def sinks(self, heads: int) -> Any:
        """The sink logits as compiled loops take them: (KV heads, query heads a KV head), or (KV heads, 0)."""
        if self.sink_logits is None:
            return np.empty((heads, 0), np.float32)
        return self.sink_logits.detach().float().contiguous().view(heads, -1).numpy()


@dataclass(frozen=True)
class Bucket:
    """Requests with the same number of query tokens, attended together.

    rows: (R,) request numbers. tokens: (R, Q) rows of the query tensor. positions: (R, Q) their
    positions in the sequence.
    """

    rows: Tensor
    tokens: Tensor
    positions: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """The buckets of one batch, made once a step and used by every layer."""

    buckets: tuple[Bucket, ...]

    def longer_than(self, tokens: int) -> AttentionPlan:
        """Without the requests that have at most so many query tokens."""
        return AttentionPlan(tuple(b for b in self.buckets if b.tokens.shape[1] > tokens))


def plan_attention(query_start: list[int], seq_lens: list[int]) -> AttentionPlan:
    """Group the requests of a batch: those with one query token together, the others by themselves.

    query_start: R + 1 offsets into the query tensor. seq_lens: R cache lengths, queries included.
    """
    counts = [query_start[r + 1] - query_start[r] for r in range(len(seq_lens))]
    decodes = [r for r, n in enumerate(counts) if n == 1]
    buckets = []
    if decodes:
        tokens = torch.tensor([query_start[r] for r in decodes])
        positions = torch.tensor([seq_lens[r] - 1 for r in decodes])
        buckets.append(Bucket(torch.tensor(decodes), tokens[:, None], positions[:, None]))
    for r, n in enumerate(counts):
        if n > 1:
            token = torch.arange(n)[None]
            buckets.append(Bucket(torch.tensor([r]), query_start[r] + token, seq_lens[r] - n + token))
    return AttentionPlan(tuple(buckets))


def split_runs(positions: Tensor, block_size: int, heads: int, window: int | None) -> Tensor:
    """(runs, 3): request, first block, block after the last; runs of a request next to each other."""
    first = (positions[:, 0] - (window or 1 << 62) + 1).clamp_min(0) // block_size
    after = positions[:, -1] // block_size + 1
    wanted = max(1, RUNS_PER_THREAD * get_num_threads() // heads)
    length = max(RUN_TOKENS // block_size, -(-int((after - first).sum()) // wanted))
    runs = [
        (request, start, min(start + length, end))
        for request, (begin, end) in enumerate(zip(first.tolist(), after.tolist(), strict=True))
        for start in range(begin, end, length)
    ]
    return torch.tensor(runs)


@dataclass
class StepPlan:
    """What all layers of a KV-cache group share in one step, of its requests with one new token each.

    seq_lens: (requests,) int, the new token included. block_table: (requests, blocks) int32. slot_mapping: (tokens,)
    int, of the whole batch. rows: (requests,) int64, where in the batch the new tokens stand; by default one after
    another.
    """

    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    token_rows: Tensor | None = None
    _runs: dict[tuple[int, int, int], tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = torch.arange(len(self.seq_lens)) if self.token_rows is None else self.token_rows
        self.rows = rows.contiguous().numpy()
        self.positions = (self.seq_lens.long() - 1)[:, None].numpy()
        self.table = self.block_table.int().contiguous().numpy()
        self.slots = self.slot_mapping.long().contiguous().numpy()

    def runs(self, block_size: int, heads: int, window: int) -> tuple[Any, Any]:
        """(runs, 3), see `split_runs`, and (requests + 1,) the first run of each request."""
        key = (block_size, heads, window)
        if key not in self._runs:
            runs = split_runs(torch.from_numpy(self.positions), block_size, heads, window or None).numpy()
            starts = np.searchsorted(runs[:, 0], np.arange(len(self.positions) + 1))
            self._runs[key] = runs, starts
        return self._runs[key]
