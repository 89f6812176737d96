"""Prompts and the tokens that each query reads with their residuals: at most DISTANCE of them, itself included.

They are added to attention over all other tokens, a partial output and the logarithm of its softmax sum.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from fraqtl_kernels.codec import dequantize, unpack
from fraqtl_kernels.cpu.codes import FAST
from fraqtl_kernels.cpu.queries import Queries
from fraqtl_kernels.cpu.residual import BEFORE, Residuals, StreamResiduals
from fraqtl_kernels.cpu.tiles import Bucket
from fraqtl_kernels.formats import VectorFormat
from fraqtl_kernels.pages import PageLayout, Planes
from fraqtl_kernels.residual import DISTANCE


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _add_residual_tokens(q, score_bias, keys, values, first, block_size, distance, window, soft_cap, out, lse):
    """See `add_residual_tokens`. q, out: (heads, group, count, D). score_bias, lse: (heads, group, count).

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
            m_new = lse[head, member, i]
            for n in range(begin, end):
                key = keys[row + n, head]
                score = np.float32(0)
                for d in range(size):
                    score += query[d] * key[d]
                if soft_cap > 0:
                    score = soft_cap * np.tanh((score + score_bias[head, member, i]) / soft_cap)
                weights[n - begin] = score
                m_new = max(m_new, score)
            alpha = np.exp(lse[head, member, i] - m_new)
            l_new = alpha
            for n in range(begin, end):
                weights[n - begin] = np.exp(weights[n - begin] - m_new)
                l_new += weights[n - begin]
            alpha /= l_new
            for d in range(size):
                result[d] *= alpha
            for n in range(begin, end):
                value, weight = values[row + n, head], weights[n - begin] / l_new
                for d in range(size):
                    result[d] += weight * value[d]
            lse[head, member, i] = m_new + np.log(l_new)


def add_residual_tokens(
    out: Tensor,
    lse: Tensor,
    queries: Queries,
    planes: Planes,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    residuals: Residuals,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """For the one request of a bucket, attention over all tokens from `out`, which leaves out those read with their
    residuals.

    out: (1, KV heads, M, D) float32 like the queries, in the basis in which V is stored. lse: (1, KV heads, M, 1),
    the logarithms of its softmax sums.
    """
    positions, size = bucket.positions[0], layout.block_size
    first, count = int(positions[0]), len(positions)
    near = torch.arange(first - BEFORE, first + count)
    blocks = block_table[int(bucket.rows[0])][near.clamp_min(0) // size].long()
    place = blocks, slice(None), near % size
    k, v = layout.format.k, layout.format.v
    token = int(bucket.tokens[0, 0])
    keys = _with_residual(planes.k[place], planes.k_scale, place, k, residuals.key, token)
    values = _with_residual(planes.v[place], planes.v_scale, place, v, residuals.value, token)
    if queries.outlier_shift is not None and planes.k_scale is not None:
        keys += queries.outlier_shift * planes.k_scale[place].signbit()[..., None]
    heads, head_size = keys.shape[1:]
    out, lse = out.contiguous(), lse.contiguous()
    _add_residual_tokens(
        queries.q.view(heads, -1, count, head_size).numpy(),
        queries.score_bias.contiguous().view(heads, -1, count).numpy(),
        keys.numpy(),
        values.numpy(),
        first,
        size,
        DISTANCE,
        window or 0,
        np.float32(soft_cap or 0),
        out.view(heads, -1, count, head_size).numpy(),
        lse.view(heads, -1, count).numpy(),
    )
    return out


def _with_residual(
    rows: Tensor,
    scales: Tensor | None,
    place: tuple[Tensor, slice, Tensor],
    vector: VectorFormat,
    residual: StreamResiduals | None,
    token: int,
) -> Tensor:
    """(tokens, KV heads, D) float32 in the stored basis: what pages hold and what residuals add to it.

    token: the batch's row of the first query, which stands at row BEFORE here.
    """
    if vector.is_raw:
        return rows.float()
    codes = unpack(rows, vector)
    stored = codes.float() - vector.midpoint if scales is None else dequantize(codes, scales[place], vector)
    return stored if residual is None else stored.add_(residual.around(token, len(rows) - BEFORE))


def warm_up_residual_attention() -> None:
    """As `warm_up_decode`."""
    q = np.zeros((1, 1, 1, 64), np.float32)
    rows, terms = np.zeros((1 + BEFORE, 1, 64), np.float32), np.zeros((1, 1, 1), np.float32)
    _add_residual_tokens(q, terms, rows, rows, 0, 16, DISTANCE, 0, np.float32(0), q.copy(), terms.copy())
