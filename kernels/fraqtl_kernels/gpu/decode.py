"""Decode attention over packed pages: 1 to 8 query tokens a request, the context split over programs.

For query position p, over key positions j <= p (and j > p - window), with c the key centre:

    softmax_j(cap(scale · q_p · (k_j + c))) · v_j,   cap(s) = soft_cap · tanh(s / soft_cap)

One program takes all query heads of one KV head, all query tokens of one request, and one chunk of
its context (`splits.py`). It writes a normalised partial output and the log2 of its softmax sum to
scratch for `combine.py`, or, without splits, the output itself. Query rotation happens at the
start, the inverse rotation of the output at the end. See `attention.py` for the loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.gpu.attention import LOG2E, add_sink, attend_tiles, load_query, store_rows
from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.combine import combine
from fraqtl_kernels.gpu.config import Tuning, attention_constants, check_dtype, rows_for, use_ptx
from fraqtl_kernels.gpu.splits import PROGRAMS_PER_SM, DecodePlan, choose_splits, chunk_tokens, oldest_visible
from fraqtl_kernels.pages import PageLayout

MAX_QUERIES = 8
DEFERRED_ELEMENTS = 16 * 128  # largest (rows, tile) for which row sums stay in registers during the loop


@triton.jit(do_not_specialize=["requests", "programs", "window"])
def decode_kernel(
    query,
    pool,
    block_table,
    query_start,
    lengths,
    output,
    partial,
    log_sums,
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
    requests,
    programs,
    window,
    scale,
    soft_cap,
    factor,
    QUERIES: tl.constexpr,
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
    DIRECT: tl.constexpr,
    DEFERRED: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(lengths + request).to(tl.int32)
    start = tl.load(query_start + request).to(tl.int32)
    count = tl.load(query_start + request + 1).to(tl.int32) - start
    if count <= 0:  # padding of a CUDA graph
        return
    oldest = oldest_visible(length, count, window, HAS_WINDOW)
    first = oldest // TILE * TILE
    last = length
    if not DIRECT:
        chunk = chunk_tokens(
            first, length, lengths, query_start, requests, kv_heads, splits, programs, window, HAS_WINDOW, TILE
        )
        first += split * chunk
        last = tl.minimum(first + chunk, length)
        if first >= length:
            return
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
    position = length - count + tl.minimum(row // GROUP, count - 1)
    out_low, out_high, high_score, total = attend_tiles(
        q_low,
        q_high,
        q_zero,
        q_constant,
        position,
        first,
        last,
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
    if DIRECT:
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
    else:
        inverse = 1 / tl.where(total > 0, total, 1.0)  # rows that see nothing of the chunk
        column = tl.arange(0, HALF)
        slot = ((request * kv_heads + head) * splits + split).to(tl.int64) * (GROUP * QUERIES) + row
        used = row < count * GROUP
        mask = used[:, None] & (column < HEAD // 2)[None, :]
        at = partial + slot[:, None] * HEAD + column[None, :]
        tl.store(at, out_low * inverse[:, None], mask=mask)
        tl.store(at + HEAD // 2, out_high * inverse[:, None], mask=mask)
        tl.store(log_sums + slot, high_score + tl.log2(total), mask=used)


def decode_tuning(layout: PageLayout, rows: int) -> Tuning:
    """Launch shape by head size and rows: chosen so that no variant of head size 64 or 128 spills (see `aot.py`)."""
    if rows <= 16 and layout.format.is_quantised:
        return Tuning(tile=128 if layout.head_size <= 128 else 64, warps=4, stages=5)
    return Tuning(tile=64 if layout.head_size <= 128 and rows <= 32 else 32, warps=4 if rows <= 32 else 8, stages=5)


def plan_decode(
    layout: PageLayout,
    *,
    requests: int,
    queries: int,
    query_heads: int,
    kv_heads: int,
    longest: int,
    multiprocessors: int,
    tuning: Tuning | None = None,
) -> DecodePlan:
    """The plan of a batch (or CUDA graph) of at most `requests`, each with at most `queries` query
    tokens (1 .. 8) and at most `longest` tokens in the cache. Looks at no device memory.
    """
    if not 1 <= queries <= MAX_QUERIES:
        raise UnsupportedError(f"decode takes 1 to {MAX_QUERIES} query tokens a request, not {queries}")
    if query_heads % kv_heads:
        raise UnsupportedError(f"{query_heads} query heads are not a multiple of {kv_heads} KV heads")
    tuning = tuning or decode_tuning(layout, rows_for(queries * query_heads // kv_heads))
    splits = choose_splits(requests, kv_heads, longest, tuning.tile, multiprocessors)
    programs = PROGRAMS_PER_SM * multiprocessors
    return DecodePlan(requests, queries, query_heads, kv_heads, splits, programs, tuning)


def decode(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    output: Tensor,
    plan: DecodePlan,
    bases: Bases,
    scratch: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    ptx: bool | None = None,
) -> None:
    """Write the attention of a batch to `output`: same result as `reference.paged_attention`.

    query, output: (tokens, query heads, D) fp16 or bf16, last dimension contiguous. pool: as for
    `PageLayout.planes`. block_table: (requests, blocks) int32. query_start: (requests + 1,) and
    lengths: (requests,) int, a request with no query token is skipped. scratch: at least
    `plan.scratch_floats(D)` fp32, contents ignored. sinks: (query heads,). ptx: inline-PTX unpack
    (default: wherever there is a GPU). One or two launches, no synchronisation.
    """
    check_dtype(query.dtype)
    if query.stride(2) != 1 or output.stride(2) != 1:
        raise ValueError("query and output must be contiguous in their last dimension")
    requests, size, ptx = lengths.shape[0], layout.head_size, use_ptx(ptx)
    if requests > plan.requests:
        raise ValueError(f"{requests} requests in a batch planned for {plan.requests}")
    partial, log_sums = split_scratch(scratch, plan, size) if plan.splits > 1 else (output, output)
    has_centre = bases.centre is not None and (soft_cap is not None or sinks is not None)
    constants = attention_constants(layout, query.dtype, ptx=ptx)
    decode_kernel[(requests, plan.kv_heads, plan.splits)](
        query,
        pool,
        block_table,
        query_start,
        lengths,
        output,
        partial,
        log_sums,
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
        requests,
        plan.programs,
        window or 0,
        scale,
        soft_cap or 1.0,
        bases.factor,
        QUERIES=plan.queries,
        GROUP=plan.group,
        ROWS=plan.rows,
        TILE=plan.tuning.tile,
        HAS_CENTRE=has_centre,
        HAS_WINDOW=window is not None,
        HAS_CAP=bool(soft_cap),
        HAS_SINKS=sinks is not None,
        DIRECT=plan.splits == 1,
        DEFERRED=deferred(plan.rows, plan.tuning.tile),
        STAGES=plan.tuning.stages,
        num_warps=plan.tuning.warps,
        **constants,
    )
    if plan.splits > 1:
        combine(partial, log_sums, query_start, lengths, output, plan, layout, bases, window=window, sinks=sinks)


def deferred(rows: int, tile: int) -> bool:
    """Whether row sums stay in registers until the loop ends."""
    return rows * tile <= DEFERRED_ELEMENTS


def split_scratch(scratch: Tensor | None, plan: DecodePlan, head_size: int) -> tuple[Tensor, Tensor]:
    """Partial outputs and log-sums as flat views of the caller's scratch. Raises ValueError if it is too small."""
    needed = plan.scratch_floats(head_size)
    if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < needed:
        raise ValueError(f"decode needs {needed} fp32 numbers of scratch for {plan.splits} splits")
    rows = needed // (head_size + 1)
    flat = scratch.view(-1)
    return flat[: rows * head_size], flat[rows * head_size : needed]
