"""CPU decode attention, compiled: few queries a request, all of its keys, straight from the pages.

The work is split into runs of blocks of one (request, KV head), so that a single long request keeps
all cores busy. A run walks its pages once, some at a time: all query heads of the KV head go over
the codes together (`rows.py`), and an online softmax (Milakov & Gimelshein, arXiv 1805.02867) keeps a
maximum, a sum and a weighted value a query (`softmax.py`).
`_combine` joins the runs: out = Σ e^(max_i - max) · acc_i / (Σ e^(max_i - max) · sum_i [+ e^(sink - max)]).
Scores have the center's constant in them (`score_bias`): a sink logit is compared with the whole score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.cpu.kernels.decode import attend_runs
from fraqtl_kernels.cpu.operands import LayerOperands, Queries
from fraqtl_kernels.cpu.pages import Pool
from fraqtl_kernels.cpu.plan import Bucket, Softmax, split_runs
from fraqtl_kernels.formats import DEFAULT_FORMAT, get_format
from fraqtl_kernels.pages import PageLayout


def decode(
    queries: Queries,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    softmax: Softmax,
) -> tuple[Tensor, Tensor]:
    """Attention of a bucket of requests over their pages.

    block_table: (requests, blocks) int. Returns (R, KV heads, M, D) float32 like the queries, in the basis in which V
    is stored, static scales of V still to be applied; and (R, KV heads, M), the weights of all keys together.
    """
    q, positions = queries.q, bucket.positions
    block_table = block_table[
        bucket.rows
    ]  # a copy, so its memory layout, and with it the compiled code, is always the same
    runs = split_runs(positions, layout.block_size, pool.shape[1], softmax.window)
    shape = (len(runs), *q.shape[1:3])
    m_i, l_i = q.new_empty(shape), q.new_empty(shape)
    out = q.new_empty(*shape, q.shape[-1])
    attend_runs(
        q.numpy(),
        torch.stack([queries.q_sum, queries.score_bias, queries.outlier_bias]).numpy(),
        # A position's residuals stand in the pages only until the next one comes.
        Pool.of(pool, layout, with_residual=positions.shape[1] == 1),
        block_table.int().numpy(),
        positions.numpy(),
        runs.numpy(),
        *softmax.limits,
        m_i.numpy(),
        l_i.numpy(),
        out.numpy(),
    )
    sinks = torch.from_numpy(softmax.sinks(pool.shape[1])).repeat_interleave(positions.shape[1], 1)
    return _combine(runs[:, 0], len(bucket.rows), m_i, l_i, out, sinks)


def warm_up_decode() -> None:
    """Compile the kernel, or load it from Numba's cache on disk, so that no request has to wait for it."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    table, rows, positions = (torch.zeros(shape, dtype=torch.int64) for shape in ((1, 1), (1,), (1, 1)))
    queries = LayerOperands.of(layout, 1).prepare_queries(torch.zeros(1, 1, 1, 64, dtype=torch.float32), 1.0)
    decode(queries, pool, layout, table.int(), Bucket(rows, positions, positions), Softmax(1.0))


def _combine(
    request: Tensor, count: int, m_i: Tensor, l_i: Tensor, out: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor]:
    """Join the runs of every request; see the module's docstring. sinks: (KV heads, M), or (KV heads, 0)."""
    if len(request) > count:
        index = request[:, None, None].expand_as(m_i)
        m_new = m_i.new_full((count, *m_i.shape[1:]), -torch.inf).scatter_reduce(0, index, m_i, "amax")
        # A run that a query sees nothing of has -inf; where all have, its request can't be in the batch.
        weight = (m_i - m_new[request]).exp()
        out = out.new_zeros(count, *out.shape[1:]).index_add_(0, request, out * weight[..., None])
        m_i, l_i = m_new, torch.zeros_like(m_new).index_add_(0, request, l_i * weight)
    total = l_i + (sinks - m_i).exp() if sinks.shape[1] else l_i
    return out / total[..., None], l_i / total
