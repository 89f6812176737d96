"""Decode attention over packed pages, launched: 1 to 8 query tokens a request, the context split over programs.

The kernels and what they compute: `kernels/decode.py`, or `kernels/transposed.py` behind `kernels/prepared.py`, and
`kernels/combine.py` behind either. How a batch is split: `plan.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fraqtl_kernels.gpu.constexprs import AttentionShape, page_shape
from fraqtl_kernels.gpu.kernels.combine import combine_kernel
from fraqtl_kernels.gpu.kernels.decode import attend_kernel
from fraqtl_kernels.gpu.kernels.prepared import prepare_kernel
from fraqtl_kernels.gpu.kernels.transposed import attend_columns_kernel
from fraqtl_kernels.gpu.operands import LayerOperands, check_contiguous
from fraqtl_kernels.gpu.plan import Batch, DecodePlan, ScratchViews, Softmax
from fraqtl_kernels.gpu.tuning import Tuning
from fraqtl_kernels.pages import PageLayout

PREPARE_OPTIONS = {"num_warps": 4, "maxnreg": 128}  # without a cap ptxas spills two registers for sm_80
COMBINE_OPTIONS = {"num_warps": 4, "maxnreg": 128}  # without a cap ptxas spills a few for sm_100


def decode(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    output: Tensor,
    plan: DecodePlan,
    operands: LayerOperands,
    scratch: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
    ptx: bool | None = None,
) -> None:
    """Write the attention of a batch to `output`: same result as `reference.paged_attention`.

    query, output: (tokens, query heads, D) fp16 or bf16, last dimension contiguous. pool: as for
    `PageLayout.planes`. block_table: (requests, blocks) int32. query_start: (requests + 1,) and
    seq_lens: (requests,) int, a request with no query token is skipped. scratch: at least
    `plan.scratch_floats(D)` fp32, contents ignored. scale, window, soft_cap, sink_logits: see
    `Softmax`. ptx: inline-PTX unpack (default: wherever there is a GPU). One to three launches, no synchronisation.
    """
    if seq_lens.shape[0] > plan.requests:
        raise ValueError(f"{seq_lens.shape[0]} requests in a batch planned for {plan.requests}")
    views = plan.scratch_views(scratch, layout.head_size)
    check_contiguous(query=query, output=output)
    operands.check(layout.format)
    batch = Batch(query, pool, layout, block_table, query_start, seq_lens)
    softmax = Softmax(scale, window, soft_cap, sink_logits)
    if plan.tuning.transposed and views is not None:
        _launch_transposed(batch, operands, plan, views, ptx, softmax)
    else:
        launch_attention(
            batch,
            output,
            operands,
            plan.shape,
            plan.tuning,
            ptx,
            softmax,
            splits=plan.splits,
            programs=plan.programs,
            scratch=views,
        )
    if views is not None:
        _launch_combine(batch, output, operands, plan, views, ptx, softmax)


def launch_attention(
    batch: Batch,
    output: Tensor,
    operands: LayerOperands,
    shape: AttentionShape,
    tuning: Tuning,
    ptx: bool | None,
    softmax: Softmax,
    *,
    splits: int,
    programs: int = 0,
    scratch: ScratchViews | None = None,
) -> None:
    """Launch the form with queries as rows, `splits` programs per request and KV head.

    With scratch they split the context, without they split the query tokens.
    """
    query, pool, table = batch.query, batch.pool, batch.block_table
    k, v = operands.key, operands.value
    read = k.read(shape.WORDS)
    attend_kernel[(batch.seq_lens.shape[0], pool.shape[1], splits)](
        query=query,
        query_stride_token=query.stride(0),
        query_stride_head=query.stride(1),
        pool=pool,
        pool_stride_block=pool.stride(0),
        pool_stride_head=pool.stride(1),
        block_table=table,
        table_stride=table.stride(0),
        query_start=batch.query_start,
        seq_lens=batch.seq_lens,
        output=output,
        output_stride_token=output.stride(0),
        output_stride_head=output.stride(1),
        partial=None if scratch is None else scratch.partial,
        lse=None if scratch is None else scratch.lse,
        basis_query=read.query,
        basis_query_stride_head=k.head_stride,
        basis_value=v.read(shape.WORDS).back,
        basis_value_stride_head=v.head_stride,
        value_center=v.own_center,
        key_scale=k.scale,
        value_scale=v.scale,
        center=read.query_center if softmax.sees_centers else None,
        outlier_shift=read.outlier_shift,
        sink_logits=softmax.sink_logits if scratch is None else None,
        requests=batch.seq_lens.shape[0],
        programs=programs,
        window=softmax.window,
        scale=softmax.scale,
        soft_cap=softmax.cap,
        key_factor=k.factor,
        value_factor=v.factor,
        PAGE=page_shape(batch.layout, query.dtype, ptx, words=shape.WORDS),
        SHAPE=shape,
        **tuning.options,
    )


def _launch_transposed(
    batch: Batch,
    operands: LayerOperands,
    plan: DecodePlan,
    scratch: ScratchViews,
    ptx: bool | None,
    softmax: Softmax,
) -> None:
    """Launch the form with queries as columns: queries into the stored basis, then attention over the splits."""
    query, pool, layout, shape = batch.query, batch.pool, batch.layout, plan.shape
    dtype = torch.float16 if plan.tuning.half and layout.format.is_quantized else query.dtype
    page = page_shape(layout, dtype, ptx, words=shape.WORDS)
    prepared = scratch.prepared.view(dtype)
    k, read = operands.key, operands.key.read(shape.WORDS)
    center = read.query_center if softmax.sees_centers else None
    requests, kv_heads = batch.seq_lens.shape[0], pool.shape[1]
    prepare_kernel[(requests, kv_heads)](
        query=query,
        query_stride_token=query.stride(0),
        query_stride_head=query.stride(1),
        query_start=batch.query_start,
        prepared=prepared,
        terms=scratch.terms,
        basis=read.query,
        basis_stride_head=k.head_stride,
        key_scale=k.scale,
        center=center,
        outlier_shift=read.outlier_shift,
        scale=softmax.scale,
        key_factor=k.factor,
        BASE_2=softmax.cap is None,
        PAGE=page,
        SHAPE=shape,
        **PREPARE_OPTIONS,
    )
    attend_columns_kernel[(requests, kv_heads, plan.splits)](
        prepared=prepared,
        terms=scratch.terms,
        pool=pool,
        pool_stride_block=pool.stride(0),
        pool_stride_head=pool.stride(1),
        block_table=batch.block_table,
        table_stride=batch.block_table.stride(0),
        query_start=batch.query_start,
        seq_lens=batch.seq_lens,
        partial=scratch.partial,
        lse=scratch.lse,
        requests=requests,
        programs=plan.programs,
        window=softmax.window,
        soft_cap=softmax.cap,
        HAS_CENTER=center is not None,
        HAS_SHIFT=read.outlier_shift is not None,
        PAGE=page,
        SHAPE=shape,
        **plan.tuning.options,
    )


def _launch_combine(
    batch: Batch,
    output: Tensor,
    operands: LayerOperands,
    plan: DecodePlan,
    scratch: ScratchViews,
    ptx: bool | None,
    softmax: Softmax,
) -> None:
    """Launch what joins the splits of either form."""
    v, shape = operands.value, plan.shape
    combine_kernel[(batch.seq_lens.shape[0], plan.kv_heads)](
        partial=scratch.partial,
        lse=scratch.lse,
        query_start=batch.query_start,
        seq_lens=batch.seq_lens,
        output=output,
        output_stride_token=output.stride(0),
        output_stride_head=output.stride(1),
        basis=v.read(shape.WORDS).back,
        basis_stride_head=v.head_stride,
        center=v.own_center,
        value_scale=v.scale,
        sink_logits=softmax.sink_logits,
        requests=batch.seq_lens.shape[0],
        splits=plan.splits,
        programs=plan.programs,
        window=softmax.window,
        factor=v.factor,
        PAGE=page_shape(batch.layout, batch.query.dtype, ptx, words=shape.WORDS),
        SHAPE=shape,
        **COMBINE_OPTIONS,
    )
