"""Causal attention of a chunk of query tokens over packed pages, for where flash attention isn't used.

The loop of decode (`attention.py`) over a tile of query tokens: one program takes all query heads of
one KV head and ROWS / group consecutive query tokens of one request, over every key they see.
The chunk's own keys and values are read back from the pages, so they must have been written before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.gpu.attention import LOG2E, add_sink, attend_tiles, load_query, store_rows
from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.config import Tuning, attention_constants, check_dtype, use_ptx
from fraqtl_kernels.gpu.decode import deferred
from fraqtl_kernels.gpu.splits import oldest_visible
from fraqtl_kernels.pages import PageLayout

ROWS = 32  # query rows of a program


@triton.jit(do_not_specialize=["window"])
def prefill_kernel(
    query,
    pool,
    block_table,
    query_start,
    lengths,
    output,
    basis_query,
    basis_output,
    centre,
    sinks,
    query_stride_token,
    query_stride_head,
    pool_stride_block,
    pool_stride_head,
    table_stride,
    output_stride_token,
    output_stride_head,
    window,
    scale,
    soft_cap,
    factor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    RAW: tl.constexpr,
    V_OFFSET: tl.constexpr,
    K_SCALE_OFFSET: tl.constexpr,
    V_SCALE_OFFSET: tl.constexpr,
    K_ZERO_LOW: tl.constexpr,
    K_ZERO_HIGH: tl.constexpr,
    V_ZERO: tl.constexpr,
    K_ROTATED: tl.constexpr,
    V_ROTATED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DEFERRED: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request).to(tl.int32)
    start = tl.load(query_start + request).to(tl.int32)
    whole = tl.load(query_start + request + 1).to(tl.int32) - start
    done = tile * (ROWS // GROUP)
    if done >= whole:
        return
    count = tl.minimum(whole - done, ROWS // GROUP)
    seen = length - whole + done + count  # tokens that the last query token of the tile sees
    start += done
    oldest = oldest_visible(seen, count, window, HAS_WINDOW)
    query_scale = scale
    if not HAS_CAP:
        query_scale *= LOG2E
    if K_ROTATED:
        query_scale *= factor
    q_low, q_high, q_zero, q_constant = load_query(
        query + start.to(tl.int64) * query_stride_token + head * GROUP * query_stride_head,
        query_stride_token,
        query_stride_head,
        count,
        basis_query,
        centre + head * HEAD,
        query_scale,
        GROUP,
        ROWS,
        HEAD,
        HALF,
        query.dtype.element_ty,
        K_ROTATED,
        HAS_CENTRE,
        K_ZERO_LOW,
        K_ZERO_HIGH,
    )
    row = tl.arange(0, ROWS)
    out_low, out_high, high_score, total = attend_tiles(
        q_low,
        q_high,
        q_zero,
        q_constant,
        seen - count + tl.minimum(row // GROUP, count - 1),
        oldest // TILE * TILE,
        seen,
        oldest,
        block_table + request.to(tl.int64) * table_stride,
        pool + head.to(tl.int64) * pool_stride_head,
        pool_stride_block,
        window,
        soft_cap,
        ROWS,
        TILE,
        HEAD,
        HALF,
        BLOCK_SIZE,
        K_BITS,
        V_BITS,
        RAW,
        V_OFFSET,
        K_SCALE_OFFSET,
        V_SCALE_OFFSET,
        V_ZERO,
        HAS_CENTRE,
        HAS_WINDOW,
        HAS_CAP,
        DEFERRED,
        PTX,
        STAGES,
    )
    if HAS_SINKS:
        total = add_sink(sinks + head * GROUP, high_score, total, GROUP, ROWS)
    inverse = 1 / total
    store_rows(
        out_low * inverse[:, None],
        out_high * inverse[:, None],
        output + start.to(tl.int64) * output_stride_token + head * GROUP * output_stride_head,
        output_stride_token,
        output_stride_head,
        count,
        basis_output,
        factor,
        GROUP,
        ROWS,
        HEAD,
        HALF,
        output.dtype.element_ty,
        V_ROTATED,
    )


def prefill_tuning(layout: PageLayout) -> Tuning:
    """Launch shape by head size."""
    return Tuning(tile=32, warps=4 if layout.head_size <= 128 else 8, stages=5)


def prefill(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    most_queries: int,
    output: Tensor,
    bases: Bases,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    ptx: bool | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Write the attention of a batch to `output`: same result as `reference.paged_attention`.

    most_queries: a bound on the query tokens of a request, any number; the rest as for `decode.decode`.
    """
    check_dtype(query.dtype)
    if query.stride(2) != 1 or output.stride(2) != 1:
        raise ValueError("query and output must be contiguous in their last dimension")
    kv_heads, ptx, tuning = pool.shape[1], use_ptx(ptx), tuning or prefill_tuning(layout)
    group = query.shape[1] // kv_heads
    has_centre = bases.centre is not None and (soft_cap is not None or sinks is not None)
    prefill_kernel[(triton.cdiv(most_queries, ROWS // group), kv_heads, lengths.shape[0])](
        query,
        pool,
        block_table,
        query_start,
        lengths,
        output,
        query if bases.k is None else bases.k,
        query if bases.v_inverse is None else bases.v_inverse,
        query if bases.centre is None else bases.centre,
        query if sinks is None else sinks,
        query.stride(0),
        query.stride(1),
        pool.stride(0),
        pool.stride(1),
        block_table.stride(0),
        output.stride(0),
        output.stride(1),
        window or 0,
        scale,
        soft_cap or 1.0,
        bases.factor,
        GROUP=group,
        ROWS=ROWS,
        TILE=tuning.tile,
        HAS_CENTRE=has_centre,
        HAS_WINDOW=window is not None,
        HAS_CAP=bool(soft_cap),
        HAS_SINKS=sinks is not None,
        DEFERRED=deferred(ROWS, tuning.tile),
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **attention_constants(layout, query.dtype, ptx=ptx),
    )
