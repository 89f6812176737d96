"""Prompts and the tokens that each query reads refined: at most DISTANCE of them, itself included.

They are added to attention over all other tokens, a partial output and the logarithm of its softmax sum.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from fraqtl_kernels.codec import dequantise, unpack
from fraqtl_kernels.cpu.codes import FAST
from fraqtl_kernels.cpu.queries import Queries
from fraqtl_kernels.cpu.refinements import BEFORE, Finer, Refinements
from fraqtl_kernels.cpu.tiles import Bucket
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.refinement import DISTANCE


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _add_nearest(q, base, keys, values, first, block_size, distance, window, soft_cap, out, total):
    """See `add_nearest`. q, out: (heads, group, count, D). base, total: (heads, group, count).

    keys, values: (BEFORE + count, heads, D), the row of query i at BEFORE + i.
    """
    heads, group, count, size = q.shape
    for item in prange(heads * group):
        head, member = item // group, item % group
        weights = np.empty(distance, np.float32)
        for i in range(count):
            offset = (first + i) % block_size
            begin = max(0, offset - distance + 1)
            if window > 0:
                begin = max(begin, offset - window + 1)
            end = min(offset, block_size - distance - 1) + 1
            if end <= begin:
                continue
            row = i + distance - 1 - offset  # of the block's first token
            query, result = q[head, member, i], out[head, member, i]
            top = total[head, member, i]
            for n in range(begin, end):
                key = keys[row + n, head]
                score = np.float32(0)
                for d in range(size):
                    score += query[d] * key[d]
                if soft_cap > 0:
                    score = soft_cap * np.tanh((score + base[head, member, i]) / soft_cap)
                weights[n - begin] = score
                top = max(top, score)
            decay = np.exp(total[head, member, i] - top)
            added = decay
            for n in range(begin, end):
                weights[n - begin] = np.exp(weights[n - begin] - top)
                added += weights[n - begin]
            decay /= added
            for d in range(size):
                result[d] *= decay
            for n in range(begin, end):
                value, weight = values[row + n, head], weights[n - begin] / added
                for d in range(size):
                    result[d] += weight * value[d]
            total[head, member, i] = top + np.log(added)


def add_nearest(
    out: Tensor,
    total: Tensor,
    queries: Queries,
    planes: Planes,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    refinements: Refinements,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """For the one request of a bucket, attention over all tokens from `out`, which leaves out those read refined.

    out: (1, KV heads, M, D) float32 like the queries, in the basis in which V is stored. total: (1, KV heads, M, 1),
    the logarithms of its softmax sums.
    """
    positions, size = bucket.positions[0], layout.block_size
    first, count = int(positions[0]), len(positions)
    near = torch.arange(first - BEFORE, first + count)
    blocks = block_table[int(bucket.rows[0])][near.clamp_min(0) // size].long()
    place = blocks, slice(None), near % size
    k, v = layout.format.k, layout.format.v
    token = int(bucket.tokens[0, 0])
    keys = _refined(planes.k[place], planes.k_scale, place, k, refinements.key, token)
    values = _refined(planes.v[place], planes.v_scale, place, v, refinements.value, token)
    if queries.sink_shift is not None and planes.k_scale is not None:
        keys += queries.sink_shift * planes.k_scale[place].signbit()[..., None]
    heads, head_size = keys.shape[1:]
    out, total = out.contiguous(), total.contiguous()
    _add_nearest(
        queries.q.view(heads, -1, count, head_size).numpy(),
        queries.base.contiguous().view(heads, -1, count).numpy(),
        keys.numpy(),
        values.numpy(),
        first,
        size,
        DISTANCE,
        window or 0,
        np.float32(soft_cap or 0),
        out.view(heads, -1, count, head_size).numpy(),
        total.view(heads, -1, count).numpy(),
    )
    return out


def _refined(
    rows: Tensor,
    scales: Tensor | None,
    place: tuple[Tensor, slice, Tensor],
    vector: VectorFormat,
    finer: Finer | None,
    token: int,
) -> Tensor:
    """(tokens, KV heads, D) float32 in the stored basis: what pages hold and what refinements add to it.

    token: the batch's row of the first query, which stands at row BEFORE here.
    """
    if vector.is_raw:
        return rows.float()
    codes = unpack(rows, vector)
    stored = codes.float() - vector.midpoint if scales is None else dequantise(codes, scales[place], vector)
    return stored if finer is None else stored.add_(finer.around(token, len(rows) - BEFORE))


def warm_up_nearest() -> None:
    """As `warm_up_decode`."""
    q = np.zeros((1, 1, 1, 64), np.float32)
    rows, terms = np.zeros((1 + BEFORE, 1, 64), np.float32), np.zeros((1, 1, 1), np.float32)
    _add_nearest(q, terms, rows, rows, 0, 16, DISTANCE, 0, np.float32(0), q.copy(), terms.copy())
