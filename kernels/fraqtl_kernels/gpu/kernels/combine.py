"""Merge the splits of a decode batch: the second launch of `decode.py`.

    out = (Σ_s 2^(l_s - m) · out_s) / (Σ_s 2^(l_s - m) [+ exp(sink logit) · 2^-m]),   m = max_s l_s

over the splits that have a piece, then back into the model's basis and the output dtype. One program
per (request, KV head) takes all its query rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.output import store_output
from fraqtl_kernels.gpu.kernels.parts import load_parts
from fraqtl_kernels.gpu.kernels.queries import query_rows
from fraqtl_kernels.gpu.kernels.softmax import add_sink_logits
from fraqtl_kernels.gpu.kernels.splits import count_pieces, oldest_visible


@triton.jit(do_not_specialize=["requests", "splits", "programs", "window"])
def combine_kernel(
    partial,  # fp32 (requests, KV heads, splits, query rows, D): normalized outputs in V's stored basis
    lse,  # fp32 (requests, KV heads, splits, query rows): log2 of their softmax sums
    query_start,
    seq_lens,
    output,
    output_stride_token,
    output_stride_head,
    basis,  # this and what follows are fields of `StreamOperands` and `ReadOperands`, of the values
    basis_stride_head,
    center,
    value_scale,
    sink_logits,
    requests,
    splits,
    programs,
    window,
    factor,
    PAGE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    request, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    length = tl.load(seq_lens + request).to(tl.int32)
    start = tl.load(query_start + request).to(tl.int32)
    count = tl.load(query_start + request + 1).to(tl.int32) - start
    if count <= 0:
        return
    ROWS: tl.constexpr = SHAPE.ROWS
    TILE: tl.constexpr = SHAPE.TILE
    V: tl.constexpr = PAGE.V
    PARTS: tl.constexpr = V.PARTS
    WIDTH: tl.constexpr = V.WIDTH
    STORED: tl.constexpr = SHAPE.GROUP * SHAPE.QUERIES
    first = oldest_visible(length, count, window) // TILE * TILE
    pieces, _ = count_pieces(first, length, seq_lens, query_start, requests, kv_heads, splits, programs, window, SHAPE)
    row = tl.arange(0, ROWS)
    used = row < count * SHAPE.GROUP
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    out = ()
    for _ in tl.static_range(PARTS):
        out = out + (tl.zeros([ROWS, WIDTH], tl.float32),)
    split_start = ((request * kv_heads + head) * splits).to(tl.int64) * STORED + row
    for split in tl.range(0, pieces, num_stages=3):
        slot = split_start + split * STORED
        split_lse = tl.load(lse + slot, mask=used, other=float("-inf"))
        parts = load_parts(partial + slot[:, None] * PAGE.HEAD, used[:, None], V)
        m_new = tl.maximum(m_i, split_lse)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m_i - shift)
        weight = tl.exp2(split_lse - shift)
        m_i = m_new
        l_i = l_i * alpha + weight
        new_out = ()
        for part in tl.static_range(PARTS):
            new_out = new_out + (out[part] * alpha[:, None] + parts[part] * weight[:, None],)
        out = new_out
    of_keys = l_i
    if sink_logits is not None:
        l_i = add_sink_logits(sink_logits, head, m_i, l_i, SHAPE)
    l_i = tl.where(used, l_i, 1.0)
    normalized = ()
    for part in tl.static_range(PARTS):
        normalized = normalized + (out[part] / l_i[:, None],)
    at = output + start.to(tl.int64) * output_stride_token + head * SHAPE.GROUP * output_stride_head
    rows, stored = query_rows(at, output_stride_token, output_stride_head, count, SHAPE)
    weight_share = of_keys / l_i
    store_output(normalized, weight_share, rows, stored, head, basis, basis_stride_head, center, value_scale, factor, V)
