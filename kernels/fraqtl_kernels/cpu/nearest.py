"""Attention of prompts over the tokens that each query reads refined: at most DISTANCE of them, itself included.

What it gives is joined with attention over all other tokens by the logarithms of their softmax sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.cpu.queries import Queries
from fraqtl_kernels.cpu.refinements import BEFORE, Finer, Refinements
from fraqtl_kernels.cpu.tiles import Bucket
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.reference import dequantise, unpack
from fraqtl_kernels.refinement import DISTANCE, is_refined


def attend_nearest(
    queries: Queries,
    planes: Planes,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    refinements: Refinements,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """For the one request of a bucket. Returns (1, KV heads, M, D) float32 like the queries, in the basis in which V is
    stored, and the logarithms (1, KV heads, M, 1) of the softmax sums; -inf for queries that read nothing refined."""
    positions, size = bucket.positions[0], layout.block_size
    first, count = int(positions[0]), len(positions)
    near = torch.arange(first - BEFORE, first + count)
    table = block_table[int(bucket.rows[0])]
    place = table[near.clamp_min(0) // size].long(), slice(None), near % size
    k, v = layout.format.k, layout.format.v
    token = int(bucket.tokens[0, 0])
    key = _refined(planes.k[place], planes.k_scale, place, k, refinements.key, token)
    value = _refined(planes.v[place], planes.v_scale, place, v, refinements.value, token)
    if queries.sink_shift is not None and planes.k_scale is not None:
        key += queries.sink_shift * planes.k_scale[place].signbit()[..., None]
    # Blocks before that of the first query may be freed and hold anything
    gone = (near // size < first // size)[:, None, None]
    keys, values = (x.masked_fill(gone, 0).unfold(0, DISTANCE, 1) for x in (key, value))  # (count, heads, D, DISTANCE)
    heads = keys.shape[1]
    q = queries.q.view(heads, -1, count, queries.q.shape[-1])
    scores = torch.einsum("hgqd,qhdw->hgqw", q, keys)
    if soft_cap:
        scores = soft_cap * torch.tanh((scores + queries.base.view(heads, -1, count, 1)) / soft_cap)
    of = positions[:, None] + torch.arange(-BEFORE, 1)
    seen = is_refined(positions[:, None], of, size) & (of >= 0)
    if window is not None:
        seen &= of > positions[:, None] - window
    scores = scores.masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    weights = (scores - total.nan_to_num(neginf=0.0)).exp()
    out = torch.einsum("hgqw,qhdw->hgqd", weights, values)
    return out.reshape(queries.q.shape), total.view(1, heads, -1, 1)


def _refined(
    rows: Tensor,
    scales: Tensor | None,
    place: tuple[Tensor, slice, Tensor],
    vector: VectorFormat,
    finer: Finer | None,
    token: int,
) -> Tensor:
    """(tokens, KV heads, D) float32 in the stored basis: what pages hold and what refinements add to it.

    token: the batch's row of the first query, which stands at row BEFORE here."""
    if vector.is_raw:
        return rows.float()
    codes = unpack(rows, vector)
    stored = codes.float() - vector.midpoint if scales is None else dequantise(codes, scales[place], vector)
    return stored if finer is None else stored + finer.around(token, len(rows) - BEFORE)


def join(out: Tensor, total: Tensor, near: Tensor, near_total: Tensor) -> Tensor:
    """Two partial attentions (..., D) and the logarithms (..., 1) of their sums as one."""
    joined = torch.logaddexp(total, near_total)
    return out * (total - joined).exp() + near * (near_total - joined).exp()
