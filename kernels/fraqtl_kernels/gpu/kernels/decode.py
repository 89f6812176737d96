"""Decode attention over packed pages: 1 to 8 query tokens a request, the context split over programs.

For query position p, over key positions j <= p (and j > p - window):

    softmax_j(cap(scale · q_p · k_j)) · v_j,   cap(s) = soft_cap · tanh(s / soft_cap)

One program takes all query heads of one KV head, up to QUERIES query tokens of one request, and one chunk of its
context (`splits.py`). It writes a normalized partial output and the log2 of its softmax sum to
scratch for `combine.py`, or, without splits, the output itself. Query rotation happens at the
start, the inverse rotation of the output at the end. See `rows.py` for the loop. Prefill takes the same kernel, without
splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.output import store_output
from fraqtl_kernels.gpu.kernels.parts import store_parts
from fraqtl_kernels.gpu.kernels.queries import load_query, query_rows
from fraqtl_kernels.gpu.kernels.rows import attend_tiles
from fraqtl_kernels.gpu.kernels.softmax import LOG2E, add_sink_logits
from fraqtl_kernels.gpu.kernels.splits import count_pieces, oldest_visible, piece_start


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
