"""What a step attends: its requests, sorted by how many query tokens they have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    @property
    def prompts(self) -> AttentionPlan:
        """Without the requests that have one query token."""
        return AttentionPlan(tuple(b for b in self.buckets if b.tokens.shape[1] > 1))


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
