"""Causal attention of a chunk of query tokens over packed pages, for where flash attention isn't used.

The kernel of decode without splits: one program takes all query heads of one KV head and some consecutive
query tokens of one request, over every key they see.
The chunk's own keys and values are read back from the pages, so they must have been written before.
"""

from __future__ import annotations

import triton
from torch import Tensor

from fraqtl_kernels.gpu.constexprs import AttentionShape
from fraqtl_kernels.gpu.decode import launch_attention
from fraqtl_kernels.gpu.operands import LayerOperands, check_contiguous
from fraqtl_kernels.gpu.plan import Batch, Softmax
from fraqtl_kernels.gpu.tuning import Tuning
from fraqtl_kernels.pages import PageLayout

ROWS = 32  # query rows of a program


def prefill_tuning(layout: PageLayout) -> Tuning:
    """Launch shape by head size."""
    return Tuning(tile=32, warps=4 if layout.head_size <= 128 else 8, stages=5)


def prefill(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    output: Tensor,
    operands: LayerOperands,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
    ptx: bool | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Write the attention of a batch to `output`: same result as `reference.paged_attention`.

    max_query_len: a bound on the query tokens of a request, any number; the rest as for `decode.decode`.
    """
    check_contiguous(query=query, output=output)
    operands.check(layout.format)
    tuning = tuning or prefill_tuning(layout)
    group = query.shape[1] // pool.shape[1]
    shape = AttentionShape(max(1, ROWS // group), group, tuning.tile, tuning.stages)
    batch = Batch(query, pool, layout, block_table, query_start, seq_lens)
    splits = triton.cdiv(max_query_len, shape.QUERIES)
    softmax = Softmax(scale, window, soft_cap, sink_logits)
    launch_attention(batch, output, operands, shape, tuning, ptx, softmax, splits=splits)
