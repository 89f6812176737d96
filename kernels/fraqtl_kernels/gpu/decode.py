"""Decode attention over packed pages: 1 to 8 query tokens a request, the context split over programs.

For query position p, over key positions j <= p (and j > p - window):

    softmax_j(cap(scale · q_p · k_j)) · v_j,   cap(s) = soft_cap · tanh(s / soft_cap)

One program takes all query heads of one KV head, up to QUERIES query tokens of one request, and one chunk of its
context (`splits.py`). It writes a normalized partial output and the log2 of its softmax sum to
scratch for `combine.py`, or, without splits, the output itself. Query rotation happens at the
start, the inverse rotation of the output at the end. See `attention.py` for the loop; `prefill.py` launches the same
kernel without splits.
"""

from __future__ import annotations

from typing import Unpack

import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.gpu.attention import LOG2E, add_sink_logits, attend_tiles, load_query, query_rows, store_output
from fraqtl_kernels.gpu.combine import OPTIONS as COMBINE_OPTIONS
from fraqtl_kernels.gpu.combine import combine_kernel
from fraqtl_kernels.gpu.config import AttentionShape, Scoring, Tuning, check_contiguous, page_shape, rows_for
from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.gpu.splits import DecodePlan, choose_splits, count_pieces, oldest_visible, piece_start
from fraqtl_kernels.gpu.tiles import store_parts
from fraqtl_kernels.gpu.transposed import launch_transposed
from fraqtl_kernels.gpu.tuned import tuned
from fraqtl_kernels.pages import PageLayout

MAX_QUERIES = 8


# Prompts behind decodes are slices of the batch's tensors: where they begin must not decide what is compiled.
@triton.jit(
    do_not_specialize=["requests", "programs", "window"],
    do_not_specialize_on_alignment=["block_table", "query_start", "seq_lens"],
)
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
    seq_lens,
    output,  # like query
    output_stride_token,
    output_stride_head,
    partial,  # see `combine.py`; None: write to output, each program QUERIES tokens of its own
    lse,
    basis_query,  # these and what follows are fields of `StreamOperands` and `ReadOperands`
    basis_query_stride_head,
    basis_value,
    basis_value_stride_head,
    value_center,
    key_scale,
    value_scale,
    center,  # None also where softmax is blind to it
    outlier_shift,
    sink_logits,
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
    request, head, split_idx = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + request).to(tl.int32)
    start = tl.load(query_start + request).to(tl.int32)
    whole = tl.load(query_start + request + 1).to(tl.int32) - start
    done = split_idx * SHAPE.QUERIES if partial is None else 0
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
        pieces, own = count_pieces(
            first, length, seq_lens, query_start, requests, kv_heads, splits, programs, window, SHAPE
        )
        if split_idx >= pieces:
            return
        last = tl.minimum(first + piece_start(split_idx + 1, pieces, own) * TILE, length)
        first += piece_start(split_idx, pieces, own) * TILE
    if soft_cap is None:
        scale *= LOG2E
    token = (start + done).to(tl.int64)
    at = query + token * query_stride_token + head * SHAPE.GROUP * query_stride_head
    rows, used = query_rows(at, query_stride_token, query_stride_head, count, SHAPE)
    q_parts, q_zero, q_constant, q_shift = load_query(
        rows,
        used,
        head,
        basis_query,
        basis_query_stride_head,
        key_scale,
        center,
        outlier_shift,
        scale,
        key_factor,
        K,
        query.dtype.element_ty,
    )
    row = tl.arange(0, ROWS)
    position = length - whole + done + tl.minimum(row // SHAPE.GROUP, count - 1)
    parts, m_i, l_i = attend_tiles(
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
        center is not None,
        outlier_shift is not None,
        PAGE,
        SHAPE,
    )
    PARTS: tl.constexpr = V.PARTS
    normalized = ()
    if partial is None:
        of_keys = l_i
        if sink_logits is not None:
            l_i = add_sink_logits(sink_logits, head, m_i, l_i, SHAPE)
        for part in tl.static_range(PARTS):
            normalized = normalized + (parts[part] / l_i[:, None],)
        at = output + token * output_stride_token + head * SHAPE.GROUP * output_stride_head
        rows, used = query_rows(at, output_stride_token, output_stride_head, count, SHAPE)
        store_output(
            normalized,
            of_keys / l_i,
            rows,
            used,
            head,
            basis_value,
            basis_value_stride_head,
            value_center,
            value_scale,
            value_factor,
            V,
        )
    else:
        divisor = tl.where(l_i > 0, l_i, 1.0)  # rows that see nothing of the chunk
        for part in tl.static_range(PARTS):
            normalized = normalized + (parts[part] / divisor[:, None],)
        slot = ((request * kv_heads + head) * splits + split_idx).to(tl.int64) * (SHAPE.GROUP * SHAPE.QUERIES) + row
        used = row < count * SHAPE.GROUP
        store_parts(partial + slot[:, None] * PAGE.HEAD, normalized, used[:, None], tl.float32, V)
        tl.store(lse + slot, m_i + tl.log2(l_i), mask=used)


def launch_attention(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    output: Tensor,
    operands: LayerOperands,
    shape: AttentionShape,
    tuning: Tuning,
    splits: int,
    scratch: tuple[Tensor, Tensor] | None,
    programs: int,
    ptx: bool | None,
    scoring: Scoring,
) -> None:
    """Launch `attend_kernel`, `splits` programs per request and KV head; with scratch they split the context."""
    page = page_shape(layout, query.dtype, ptx, words=shape.WORDS)
    operands.check(layout.format)
    check_contiguous(query=query, output=output)
    sink_logits, soft_cap = scoring.get("sink_logits"), scoring.get("soft_cap") or None
    partial, lse = scratch or (None, None)
    k, v = operands.key, operands.value
    of_keys = k.read(shape.WORDS)
    attend_kernel[(seq_lens.shape[0], pool.shape[1], splits)](
        query,
        query.stride(0),
        query.stride(1),
        pool,
        pool.stride(0),
        pool.stride(1),
        block_table,
        block_table.stride(0),
        query_start,
        seq_lens,
        output,
        output.stride(0),
        output.stride(1),
        partial,
        lse,
        of_keys.query,
        k.head_stride,
        v.read(shape.WORDS).back,
        v.head_stride,
        v.own_center,
        k.scale,
        v.scale,
        None if soft_cap is None and sink_logits is None else of_keys.query_center,
        of_keys.outlier_shift,
        sink_logits if partial is None else None,
        seq_lens.shape[0],
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
    """Launch shape by head size and rows: chosen so that no variant of head size 64 or 128 spills (see `aot.py`).

    Block numbers and codes are two levels of loads, which share the stages: 4 give one buffer of codes, 5 give two, 7
    give three.
    """
    if rows <= 16 and layout.format.is_quantized:
        # A cap that two programs leave room for; without one ptxas spills for the sake of a third.
        tile = 128 if layout.head_size <= 128 else 64
        if layout.format.v.groups > 1:  # a sum of weights for each group
            tile = 32 if layout.head_size <= 64 else 64
        return Tuning(tile, warps=4, stages=5, registers=255)
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
    max_seq_len: int,
    num_sms: int,
    tuning: Tuning | None = None,
) -> DecodePlan:
    """The plan of a batch (or CUDA graph) of at most `requests`, each with at most `queries` query
    tokens (1 .. 8) and at most `max_seq_len` tokens in the cache. Looks at no device memory.
    """
    if not 1 <= queries <= MAX_QUERIES:
        raise UnsupportedError(f"decode takes 1 to {MAX_QUERIES} query tokens a request, not {queries}")
    if query_heads % kv_heads:
        raise UnsupportedError(f"{query_heads} query heads are not a multiple of {kv_heads} KV heads")
    rows = rows_for(queries * query_heads // kv_heads)
    tuning = tuning or tuned(layout, rows, requests * kv_heads) or decode_tuning(layout, rows)
    splits = choose_splits(requests, kv_heads, max_seq_len, tuning, num_sms)
    programs = tuning.programs_per_sm * num_sms
    return DecodePlan(requests, queries, query_heads, kv_heads, splits, programs, tuning)


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
    ptx: bool | None = None,
    **scoring: Unpack[Scoring],
) -> None:
    """Write the attention of a batch to `output`: same result as `reference.paged_attention`.

    query, output: (tokens, query heads, D) fp16 or bf16, last dimension contiguous. pool: as for
    `PageLayout.planes`. block_table: (requests, blocks) int32. query_start: (requests + 1,) and
    seq_lens: (requests,) int, a request with no query token is skipped. scratch: at least
    `plan.scratch_floats(D)` fp32, contents ignored. ptx: inline-PTX unpack
    (default: wherever there is a GPU). scoring: see `Scoring`. One to three launches, no synchronisation.
    """
    requests = seq_lens.shape[0]
    if requests > plan.requests:
        raise ValueError(f"{requests} requests in a batch planned for {plan.requests}")
    views = plan.scratch_views(scratch, layout.head_size)
    check_contiguous(query=query, output=output)
    operands.check(layout.format)
    batch = (query, pool, layout, block_table, query_start, seq_lens)
    if plan.tuning.transposed and views is not None:
        launch_transposed(*batch, plan, operands, views, ptx, scoring)
    else:
        split = None if views is None else (views.partial, views.lse)
        launch_attention(
            *batch, output, operands, plan.shape, plan.tuning, plan.splits, split, plan.programs, ptx, scoring
        )
    if views is None:
        return
    combine_kernel[(requests, plan.kv_heads)](
        views.partial,
        views.lse,
        query_start,
        seq_lens,
        output,
        output.stride(0),
        output.stride(1),
        operands.value.read(plan.shape.WORDS).back,
        operands.value.head_stride,
        operands.value.own_center,
        operands.value.scale,
        scoring.get("sink_logits"),
        requests,
        plan.splits,
        plan.programs,
        scoring.get("window"),
        operands.value.factor,
        PAGE=page_shape(layout, query.dtype, ptx, words=plan.shape.WORDS),
        SHAPE=plan.shape,
        **COMBINE_OPTIONS,
    )
