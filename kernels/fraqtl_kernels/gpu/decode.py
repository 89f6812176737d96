"""Decode attention over packed pages: 1 to 8 query tokens a request, the context split over programs.

For query position p, over key positions j <= p (and j > p - window):

    softmax_j(cap(scale · q_p · k_j)) · v_j,   cap(s) = soft_cap · tanh(s / soft_cap)

One program takes all query heads of one KV head, up to QUERIES query tokens of one request, and one chunk of its
context (`splits.py`). It writes a normalised partial output and the log2 of its softmax sum to
scratch for `combine.py`, or, without splits, the output itself. Query rotation happens at the
start, the inverse rotation of the output at the end. See `attention.py` for the loop; `prefill.py` launches the same
kernel without splits.
"""

from __future__ import annotations

from typing import Required, TypedDict, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.gpu.attention import LOG2E, add_sink, attend_tiles, load_query, query_rows, store_output
from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.combine import OPTIONS as COMBINE_OPTIONS
from fraqtl_kernels.gpu.combine import combine_kernel
from fraqtl_kernels.gpu.config import AttentionShape, Tuning, check_contiguous, page_shape, rows_for
from fraqtl_kernels.gpu.splits import PROGRAMS_PER_SM, DecodePlan, choose_splits, chunk_tokens, oldest_visible
from fraqtl_kernels.gpu.tiles import store_parts
from fraqtl_kernels.pages import PageLayout

MAX_QUERIES = 8


@triton.jit(do_not_specialize=["requests", "programs", "window"])
def attend_kernel(
    query,  # (tokens, query heads, D)
    query_stride_token,
    query_stride_head,
    pool,
    pool_stride_block,
    pool_stride_head,
    block_table,
    table_stride,
    query_start,
    lengths,
    output,  # like query
    output_stride_token,
    output_stride_head,
    partial,  # see `combine.py`; None: write to output, each program QUERIES tokens of its own
    log_sums,
    basis_query,  # these and what follows are fields of `Side` and `Reading`
    basis_query_stride_head,
    basis_value,
    basis_value_stride_head,
    value_centre,
    key_scale,
    value_scale,
    centre,  # None also where softmax is blind to it
    sink_shift,
    sinks,
    requests,
    programs,
    window,
    scale,
    soft_cap,
    key_factor,
    value_factor,
    PAGE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    request, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request).to(tl.int32)
    start = tl.load(query_start + request).to(tl.int32)
    whole = tl.load(query_start + request + 1).to(tl.int32) - start
    done = share * SHAPE.QUERIES if partial is None else 0
    count = tl.minimum(whole - done, SHAPE.QUERIES)
    if count <= 0:  # also padding of a CUDA graph
        return
    ROWS: tl.constexpr = SHAPE.ROWS
    TILE: tl.constexpr = SHAPE.TILE
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    last = length - whole + done + count  # tokens that the last query token of the program sees
    oldest = oldest_visible(last, count, window)
    first = oldest // TILE * TILE
    if partial is not None:
        kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
        chunk = chunk_tokens(first, length, lengths, query_start, requests, kv_heads, splits, programs, window, TILE)
        first += share * chunk
        last = tl.minimum(first + chunk, length)
        if first >= length:
            return
    if soft_cap is None:
        scale *= LOG2E
    token = (start + done).to(tl.int64)
    at = query + token * query_stride_token + head * SHAPE.GROUP * query_stride_head
    rows, used = query_rows(at, query_stride_token, query_stride_head, count, SHAPE)
    q_parts, q_zero, q_constant, q_shift = load_query(
        rows, used, head, basis_query, basis_query_stride_head, key_scale, centre, sink_shift, scale, key_factor, K
    )
    row = tl.arange(0, ROWS)
    position = length - whole + done + tl.minimum(row // SHAPE.GROUP, count - 1)
    parts, high_score, total = attend_tiles(
        q_parts,
        q_zero,
        q_constant,
        q_shift,
        position,
        first,
        last,
        oldest,
        length,
        block_table + request.to(tl.int64) * table_stride,
        pool + head.to(tl.int64) * pool_stride_head,
        pool_stride_block,
        window,
        soft_cap,
        centre is not None,
        sink_shift is not None,
        PAGE,
        SHAPE,
    )
    PARTS: tl.constexpr = V.PARTS
    normalised = ()
    if partial is None:
        of_keys = total
        if sinks is not None:
            total = add_sink(sinks, head, high_score, total, SHAPE)
        for part in tl.static_range(PARTS):
            normalised = normalised + (parts[part] / total[:, None],)
        at = output + token * output_stride_token + head * SHAPE.GROUP * output_stride_head
        rows, used = query_rows(at, output_stride_token, output_stride_head, count, SHAPE)
        store_output(
            normalised,
            of_keys / total,
            rows,
            used,
            head,
            basis_value,
            basis_value_stride_head,
            value_centre,
            value_scale,
            value_factor,
            V,
        )
    else:
        divisor = tl.where(total > 0, total, 1.0)  # rows that see nothing of the chunk
        for part in tl.static_range(PARTS):
            normalised = normalised + (parts[part] / divisor[:, None],)
        slot = ((request * kv_heads + head) * splits + share).to(tl.int64) * (SHAPE.GROUP * SHAPE.QUERIES) + row
        used = row < count * SHAPE.GROUP
        store_parts(partial + slot[:, None] * PAGE.HEAD, normalised, used[:, None], tl.float32, V)
        tl.store(log_sums + slot, high_score + tl.log2(total), mask=used)


class Scoring(TypedDict, total=False):
    """How scores become weights. sinks: (query heads,), the logarithms of extra terms of the softmax sums."""

    scale: Required[float]
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None


def launch_attention(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    output: Tensor,
    bases: Bases,
    shape: AttentionShape,
    tuning: Tuning,
    shares: int,
    scratch: tuple[Tensor, Tensor] | None,
    programs: int,
    ptx: bool | None,
    scoring: Scoring,
) -> None:
    """Launch `attend_kernel`, `shares` programs per request and KV head; with scratch they split the context."""
    page = page_shape(layout, query.dtype, ptx, words=shape.WORDS)
    bases.check(layout.format)
    check_contiguous(query=query, output=output)
    sinks, soft_cap = scoring.get("sinks"), scoring.get("soft_cap") or None
    partial, log_sums = scratch or (None, None)
    k, v = bases.key, bases.value
    of_keys = k.reading(shape.WORDS)
    attend_kernel[(lengths.shape[0], pool.shape[1], shares)](
        query,
        query.stride(0),
        query.stride(1),
        pool,
        pool.stride(0),
        pool.stride(1),
        block_table,
        block_table.stride(0),
        query_start,
        lengths,
        output,
        output.stride(0),
        output.stride(1),
        partial,
        log_sums,
        of_keys.query,
        k.head_stride,
        v.reading(shape.WORDS).back,
        v.head_stride,
        v.own_centre,
        k.scale,
        v.scale,
        None if soft_cap is None and sinks is None else of_keys.query_centre,
        of_keys.sink_shift,
        sinks if partial is None else None,
        lengths.shape[0],
        programs,
        scoring.get("window"),
        scoring["scale"],
        soft_cap,
        k.factor,
        v.factor,
        PAGE=page,
        SHAPE=shape,
        **tuning.options,
    )


def decode_tuning(layout: PageLayout, rows: int) -> Tuning:
    """Launch shape by head size and rows: chosen so that no variant of head size 64 or 128 spills (see `aot.py`)."""
    if rows <= 16 and layout.format.is_quantised:
        # A cap that two programs leave room for; without one ptxas spills for the sake of a third.
        tile = 128 if layout.head_size <= 128 else 64
        if layout.format.v.groups > 1:  # a sum of weights for each group
            tile = 32 if layout.head_size <= 64 else 64
        return Tuning(tile, warps=4, stages=4, registers=255)
    tile = 64 if layout.head_size <= 128 and rows <= 32 else 32
    if rows > 16 and layout.head_size <= 64:
        tile = 32
    return Tuning(tile=tile, warps=4 if rows <= 32 else 8, stages=5)


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
    ptx: bool | None = None,
    **scoring: Unpack[Scoring],
) -> None:
    """Write the attention of a batch to `output`: same result as `reference.paged_attention`.

    query, output: (tokens, query heads, D) fp16 or bf16, last dimension contiguous. pool: as for
    `PageLayout.planes`. block_table: (requests, blocks) int32. query_start: (requests + 1,) and
    lengths: (requests,) int, a request with no query token is skipped. scratch: at least
    `plan.scratch_floats(D)` fp32, contents ignored. ptx: inline-PTX unpack
    (default: wherever there is a GPU). scoring: see `Scoring`. One or two launches, no synchronisation.
    """
    requests = lengths.shape[0]
    if requests > plan.requests:
        raise ValueError(f"{requests} requests in a batch planned for {plan.requests}")
    split = split_scratch(scratch, plan, layout.head_size) if plan.splits > 1 else None
    launch_attention(
        query,
        pool,
        layout,
        block_table,
        query_start,
        lengths,
        output,
        bases,
        plan.shape,
        plan.tuning,
        plan.splits,
        split,
        plan.programs,
        ptx,
        scoring,
    )
    if split is None:
        return
    combine_kernel[(requests, plan.kv_heads)](
        *split,
        query_start,
        lengths,
        output,
        output.stride(0),
        output.stride(1),
        bases.value.reading(plan.shape.WORDS).back,
        bases.value.head_stride,
        bases.value.own_centre,
        bases.value.scale,
        scoring.get("sinks"),
        requests,
        plan.splits,
        plan.programs,
        scoring.get("window"),
        bases.value.factor,
        PAGE=page_shape(layout, query.dtype, ptx, words=plan.shape.WORDS),
        SHAPE=plan.shape,
        **COMBINE_OPTIONS,
    )


def split_scratch(scratch: Tensor | None, plan: DecodePlan, head_size: int) -> tuple[Tensor, Tensor]:
    """Partial outputs and log-sums as flat views of the caller's scratch. Raises ValueError if it is too small."""
    needed = plan.scratch_floats(head_size)
    if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < needed:
        raise ValueError(f"decode needs {needed} fp32 numbers of scratch for {plan.splits} splits")
    rows = needed // (head_size + 1)
    flat = scratch.view(-1)
    return flat[: rows * head_size], flat[rows * head_size : needed]
