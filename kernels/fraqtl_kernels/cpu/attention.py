"""CPU attention over packed pages: prefill, chunked prefill, decode and mixed batches.

A batch is sorted into buckets once a step. Requests with few query tokens (of formats with residuals: with one) take
the compiled kernel of `decode.py`, prompts that of `prefill.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.cpu.decode import decode
from fraqtl_kernels.cpu.operands import LayerOperands
from fraqtl_kernels.cpu.plan import AttentionPlan, Bucket, Softmax
from fraqtl_kernels.cpu.prefill import prefill
from fraqtl_kernels.cpu.residual import Residuals
from fraqtl_kernels.pages import PageLayout

DECODE_QUERIES = 8  # up to so many query tokens a request take the decode kernel


def attend(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    plan: AttentionPlan,
    output: Tensor,
    operands: LayerOperands,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
    residuals: Residuals | None = None,
) -> None:
    """Write causal attention over the packed pages to `output`.

    query, output: (tokens, query heads, D) in any floating dtype; pool as for `write`;
    block_table: (requests, blocks) int. sink_logits: (query heads,). residuals: what `write` returned for this batch;
    without them requests with more than one query token read without residuals. Same result as
    `reference.paged_attention`.
    """
    softmax = Softmax(scale, window, soft_cap, sink_logits)
    for bucket in plan.buckets:
        batch = query, output, pool, layout, block_table, bucket, operands, softmax
        count = bucket.tokens.shape[1]
        if count == 1 or (residuals is None and count <= DECODE_QUERIES):
            _decode(*batch)
        else:
            prefill(*batch, residuals)


def _decode(
    query: Tensor,
    output: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    operands: LayerOperands,
    softmax: Softmax,
) -> None:
    heads = pool.shape[1]
    q = query[bucket.tokens].to(torch.float32)
    rows, count, query_heads, size = q.shape
    # All query heads of a KV head in one product: (R, KV heads, group · Q, D)
    q = q.view(rows, count, heads, -1, size).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, size)
    queries = operands.prepare_queries(q, softmax.scale)
    out = operands.restore_output(*decode(queries, pool, layout, block_table, bucket, softmax))
    out = out.view(rows, heads, -1, count, size).permute(0, 3, 1, 2, 4).reshape(rows, count, query_heads, size)
    output[bucket.tokens] = out.to(output.dtype)
