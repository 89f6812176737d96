"""CPU attention over packed pages: prefill, chunked prefill, decode and mixed batches.

A batch is sorted into buckets once a step. Requests with few query tokens (of formats with residuals: with one) take
the compiled kernel of `decode.py`; prompts take `prefill.py`, or `tiles.py` where scores are soft-capped, and
`residual_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.cpu.decode import decode
from fraqtl_kernels.cpu.prefill import LastTile, prefill
from fraqtl_kernels.cpu.queries import prepare_queries, restore_output
from fraqtl_kernels.cpu.residual import Residuals
from fraqtl_kernels.cpu.residual_attention import add_residual_tokens
from fraqtl_kernels.cpu.tiles import Bucket, attend_tiles
from fraqtl_kernels.pages import PageLayout

DECODE_QUERIES = 8  # up to so many query tokens a request take the compiled kernel
TILE_QUERIES = 1024  # query tokens of one request attended at once


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
            buckets += _prefill_tiles(r, query_start[r], n, seq_lens[r])
    return AttentionPlan(tuple(buckets))


def _prefill_tiles(request: int, first: int, count: int, length: int) -> list[Bucket]:
    # Keys behind a query are hidden, not left out: the shorter the context, the larger their part of a tile.
    step = TILE_QUERIES if length > 2 * TILE_QUERIES else max(1, TILE_QUERIES // 2)
    tiles = []
    for start in range(0, count, step):
        n = torch.arange(start, min(start + step, count))[None]
        tiles.append(Bucket(torch.tensor([request]), first + n, length - count + n))
    return tiles


def attend(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    plan: AttentionPlan,
    output: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    constants: LayerConstants = IDENTITY,
    residuals: Residuals | None = None,
) -> None:
    """Write causal attention over the packed pages to `output`.

    query, output: (tokens, query heads, D) in any floating dtype; pool as for `write`;
    block_table: (requests, blocks) int; constants as for `write`. residuals: what `write` returned for this batch;
    without them requests with more than one query token read without residuals. Same result as
    `reference.paged_attention`.
    """
    heads, last_tile = pool.shape[1], LastTile()
    for bucket in reversed(plan.buckets):  # a request's last queries first, which see all of a tile
        q = query[bucket.tokens].to(torch.float32)
        rows, count, query_heads, size = q.shape
        # All query heads of a KV head in one product: (R, KV heads, group · Q, D)
        q = q.view(rows, count, heads, -1, size).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, size)
        queries = prepare_queries(q, layout.format.k, constants, scale)
        if count == 1 or (residuals is None and count <= DECODE_QUERIES):
            out = decode(queries, pool, layout, block_table, bucket, window=window, soft_cap=soft_cap)
        else:
            batch, skip_residual = (queries, layout.planes(pool), layout, block_table, bucket), residuals is not None
            if soft_cap:
                out, lse = attend_tiles(*batch, window, soft_cap, skip_residual)
            else:
                out, lse = prefill(*batch, window, skip_residual, last_tile)
            if residuals is not None:
                out = add_residual_tokens(out, lse, *batch, residuals, window, soft_cap)
        out = restore_output(out, layout.format.v, constants)
        out = out.view(rows, heads, -1, count, size).permute(0, 3, 1, 2, 4).reshape(rows, count, query_heads, size)
        output[bucket.tokens] = out.to(output.dtype)
