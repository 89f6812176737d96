"""Tiles of keys out of packed pages, and attention over them written out.

Codes are never turned into a floating copy of the cache. A tile of pages is gathered, its codes
become floats, and the rest is folded into the two products:

    q·k = |k_scale| · (q·c - midpoint · sum(q)) + what the centers add (see `queries.py`)
    out = Σ_j (p_j · v_scale_j) · (c_j - midpoint)

Tiles of at most `TILE_TOKENS` keys are joined by their running maximum and sum (the online
softmax of Milakov & Gimelshein, arXiv 1805.02867), so the workspace does not grow with the
context or with the pool. `attend_tiles` is the path for prefill with a soft cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fraqtl_kernels.codec import dequantize, unpack
from fraqtl_kernels.cpu.queries import Queries
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.residual import reads_residual

TILE_TOKENS = 4096  # keys gathered at once


@dataclass(frozen=True)
class Bucket:
    """Requests (or one tile of one request) with the same number of query tokens, attended together.

    rows: (R,) request numbers. tokens: (R, Q) rows of the query tensor. positions: (R, Q) their
    positions in the sequence.
    """

    rows: Tensor
    tokens: Tensor
    positions: Tensor


def attend_tiles(
    queries: Queries,
    planes: Planes,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    window: int | None,
    soft_cap: float | None,
    skip_residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """skip_residual: without the tokens that queries read with their residuals. Returns (R, KV heads, M, D) float32
    like the queries, in the basis in which V is stored, and the logarithms (R, KV heads, M, 1) of the softmax sums."""
    q = queries.q
    m_i = q.new_full((*q.shape[:3], 1), -torch.inf)
    l_i = torch.zeros_like(m_i)
    out = torch.zeros_like(q)
    repeat = q.shape[2] // bucket.tokens.shape[1]
    for blocks, position in key_tiles(layout, block_table, bucket, window):
        scores = _scores(queries, planes, layout, blocks)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        hidden = position[:, None] > bucket.positions[:, :, None]  # (R, Q, keys)
        if window is not None:
            hidden |= position[:, None] <= bucket.positions[:, :, None] - window
        if skip_residual:
            hidden |= reads_residual(bucket.positions[:, :, None], position[:, None], layout.block_size)
        scores = scores.masked_fill_(hidden.repeat(1, repeat, 1)[:, None], -torch.inf)
        m_new = torch.maximum(m_i, scores.amax(-1, keepdim=True))
        m_finite = m_new.clamp_min(torch.finfo(q.dtype).min)  # a row that sees no key yet has -inf
        weights = scores.sub_(m_finite).exp_()
        alpha = (m_i - m_finite).exp()
        l_i = l_i * alpha + weights.sum(-1, keepdim=True)
        out = out * alpha + _weighted_values(weights, planes, layout, blocks, hidden.all(1))
        m_i = m_new
    empty = l_i == 0
    return out / l_i.masked_fill(empty, 1), (m_i + l_i.log()).masked_fill(empty, -torch.inf)


def key_tiles(
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


def gather(plane: Tensor, blocks: Tensor) -> Tensor:
    """(blocks, heads, N, ...) -> (R, heads, B · N, ...)"""
    return plane[blocks].transpose(1, 2).flatten(2, 3)


def codes_as_floats(plane: Tensor, vector: VectorFormat, blocks: Tensor) -> Tensor:
    codes = gather(plane, blocks)
    return (codes if vector.is_raw else unpack(codes, vector)).to(torch.float32)


def tile_values(plane: Tensor, scale: Tensor | None, vector: VectorFormat, blocks: Tensor) -> Tensor:
    """(R, heads, keys, D) float32: a tile as numbers, in the stored basis. Without scales, in steps."""
    codes = codes_as_floats(plane, vector, blocks)
    if vector.is_raw:
        return codes
    return codes - vector.midpoint if scale is None else dequantize(codes, gather(scale, blocks), vector)


def _scores(queries: Queries, planes: Planes, layout: PageLayout, blocks: Tensor) -> Tensor:
    vector, q = layout.format.k, queries.q
    scores = q @ codes_as_floats(planes.k, vector, blocks).transpose(-1, -2)
    if vector.is_raw:
        return scores
    scores = scores - vector.midpoint * queries.q_sum[..., None]
    if planes.k_scale is None:
        return scores
    scale = gather(planes.k_scale, blocks)[:, :, None]
    return (
        scores * scale.float().abs() + queries.score_bias[..., None] + queries.outlier_bias[..., None] * scale.signbit()
    )


def _weighted_values(weights: Tensor, planes: Planes, layout: PageLayout, blocks: Tensor, unseen: Tensor) -> Tensor:
    """unseen: (R, keys) slots that hold no key of the row; what lies there may be anything, even NaN."""
    vector = layout.format.v
    if planes.v_scale is None or vector.groups > 1:
        values = tile_values(planes.v, planes.v_scale, vector, blocks)
        return weights @ values.masked_fill(unseen[:, None, :, None], 0)
    scales = gather(planes.v_scale, blocks).float().masked_fill(unseen[:, None], 0)
    weights = weights * scales[:, :, None]
    return weights @ codes_as_floats(planes.v, vector, blocks) - vector.midpoint * weights.sum(-1, keepdim=True)
