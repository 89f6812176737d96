"""CPU attention over packed pages: prefill, chunked prefill, decode and mixed batches.

Codes are never turned into a floating copy of the cache. A tile of pages is gathered, its codes
become floats, and the rest is folded into the two products:

    q·k = k_scale · (q·c - midpoint · sum(q))      out = Σ_j (p_j · v_scale_j) · (c_j - midpoint)

Tiles of at most `TILE_TOKENS` keys are joined by their running maximum and sum (the online
softmax of Milakov & Gimelshein, arXiv 1805.02867), so the workspace does not grow with the
context or with the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.cpu.decode import decode
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.reference import rotate, unpack, unrotate

TILE_TOKENS = 4096  # keys gathered at once, over all requests of a bucket
DECODE_QUERIES = 8  # up to so many query tokens a request take the compiled kernel
TILE_QUERIES = 256  # query tokens of one request attended at once


@dataclass(frozen=True)
class Bucket:
    """Requests (or one tile of one request) with the same number of query tokens, attended together.

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


def plan_attention(query_start: list[int], lengths: list[int]) -> AttentionPlan:
    """Group the requests of a batch: those with one query token together, sorted by length.

    query_start: R + 1 offsets into the query tensor. lengths: R cache lengths, queries included.
    """
    counts = [query_start[r + 1] - query_start[r] for r in range(len(lengths))]
    decodes = sorted((r for r, n in enumerate(counts) if n == 1), key=lengths.__getitem__)
    buckets = []
    while decodes:
        # Sorted, so padding is small; each request of a bucket gets at least one block a tile.
        rows, decodes = decodes[: TILE_TOKENS // 16], decodes[TILE_TOKENS // 16 :]
        index = torch.tensor(rows)
        tokens = torch.tensor([query_start[r] for r in rows])
        buckets.append(Bucket(index, tokens[:, None], torch.tensor([lengths[r] - 1 for r in rows])[:, None]))
    for r, n in enumerate(counts):
        if n > 1:
            buckets += _prefill_tiles(r, query_start[r], n, lengths[r])
    return AttentionPlan(tuple(buckets))


def _prefill_tiles(request: int, first: int, count: int, length: int) -> list[Bucket]:
    tiles = []
    for start in range(0, count, TILE_QUERIES):
        n = torch.arange(start, min(start + TILE_QUERIES, count))[None]
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
) -> None:
    """Write causal attention over the packed pages to `output`.

    query, output: (tokens, query heads, D) in any floating dtype; pool as for `write`;
    block_table: (requests, blocks) int. Same result as `reference.paged_attention`.
    """
    planes = layout.planes(pool)
    heads = pool.shape[1]
    for bucket in plan.buckets:
        q = rotate(query[bucket.tokens].to(torch.float32), layout.format.k) * scale
        rows, count, query_heads, size = q.shape
        # All query heads of a KV head in one product: (R, KV heads, group · Q, D)
        q = q.view(rows, count, heads, -1, size).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, size)
        if count <= DECODE_QUERIES:
            out = decode(q, pool, layout, block_table, bucket.rows, bucket.positions, window=window, soft_cap=soft_cap)
        else:
            out = _attend_bucket(q, planes, layout, block_table, bucket, window, soft_cap)
        out = out.view(rows, heads, -1, count, size).permute(0, 3, 1, 2, 4).reshape(rows, count, query_heads, size)
        output[bucket.tokens] = unrotate(out, layout.format.v).to(output.dtype)


def _attend_bucket(
    q: Tensor,
    planes: Planes,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    rows, heads, queries = q.shape[:3]
    q_sum = q.sum(-1, keepdim=True)
    highest = q.new_full((rows, heads, queries, 1), -torch.inf)
    total = torch.zeros_like(highest)
    out = torch.zeros_like(q)
    repeat = queries // bucket.tokens.shape[1]
    for blocks, position in _key_tiles(layout, block_table, bucket, window):
        scores = _scores(q, q_sum, planes, layout, blocks)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        hidden = position[:, None] > bucket.positions[:, :, None]  # (R, Q, keys)
        if window is not None:
            hidden |= position[:, None] <= bucket.positions[:, :, None] - window
        scores = scores.masked_fill_(hidden.repeat(1, repeat, 1)[:, None], -torch.inf)
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        reference = new_highest.clamp_min(torch.finfo(q.dtype).min)  # a row that sees no key yet has -inf
        weights = scores.sub_(reference).exp_()
        decay = (highest - reference).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        out = out * decay + _weighted_values(weights, planes, layout, blocks, hidden.all(1))
        highest = new_highest
    return out / total


def _key_tiles(
    layout: PageLayout, block_table: Tensor, bucket: Bucket, window: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Block numbers (R, B) and key positions (R, B · N) of one tile of keys after another."""
    size = layout.block_size
    first = torch.zeros(len(bucket.rows), dtype=torch.int64)
    if window is not None:
        first = (bucket.positions[:, 0] - window + 1).clamp_min(0) // size
    last = bucket.positions[:, -1] // size  # the last block that any query of the row sees
    step = max(1, TILE_TOKENS // (size * len(bucket.rows)))
    for start in range(0, int((last - first).max()) + 1, step):
        count = min(step, int((last - first).max()) + 1 - start)
        index = first[:, None] + start + torch.arange(count)
        position = index[:, :, None] * size + torch.arange(size)
        index = index.clamp_max(block_table.shape[1] - 1).minimum(last[:, None])
        yield block_table[bucket.rows[:, None], index].long(), position.flatten(1)


def _gather(plane: Tensor, blocks: Tensor) -> Tensor:
    """(blocks, heads, N, ...) -> (R, heads, B · N, ...)"""
    return plane[blocks].transpose(1, 2).flatten(2, 3)


def _floats(plane: Tensor, vector: VectorFormat, blocks: Tensor) -> Tensor:
    codes = _gather(plane, blocks)
    return (codes if vector.is_raw else unpack(codes, vector)).to(torch.float32)


def _scores(q: Tensor, q_sum: Tensor, planes: Planes, layout: PageLayout, blocks: Tensor) -> Tensor:
    vector = layout.format.k
    scores = q @ _floats(planes.k, vector, blocks).transpose(-1, -2)
    if planes.k_scale is None:
        return scores
    return (scores - vector.midpoint * q_sum) * _gather(planes.k_scale, blocks).float()[:, :, None]


def _weighted_values(weights: Tensor, planes: Planes, layout: PageLayout, blocks: Tensor, unseen: Tensor) -> Tensor:
    """unseen: (R, keys) slots that hold no key of the row; what lies there may be anything, even NaN."""
    vector = layout.format.v
    if planes.v_scale is None:
        return weights @ _floats(planes.v, vector, blocks).masked_fill(unseen[:, None, :, None], 0)
    scales = _gather(planes.v_scale, blocks).float().masked_fill(unseen[:, None], 0)
    weights = weights * scales[:, :, None]
    return weights @ _floats(planes.v, vector, blocks) - vector.midpoint * weights.sum(-1, keepdim=True)
