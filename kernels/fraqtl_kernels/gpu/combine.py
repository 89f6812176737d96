"""Merge the splits of a decode batch: the second launch of `decode.py`.

    out = (Σ_s 2^(l_s - m) · out_s) / (Σ_s 2^(l_s - m) [+ exp(sink) · 2^-m]),   m = max_s l_s

over the splits that have a chunk, then back into the model's basis and the output dtype. One program
per (request, KV head) takes all its query rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.attention import add_sink, query_rows, store_output
from fraqtl_kernels.gpu.splits import chunk_tokens, oldest_visible
from fraqtl_kernels.gpu.tiles import load_parts

OPTIONS = {"num_warps": 4, "maxnreg": 128}  # without a cap ptxas spills a few for sm_100


@triton.jit(do_not_specialize=["requests", "splits", "programs", "window"])
def combine_kernel(
    partial,  # fp32 (requests, KV heads, splits, query rows, D): normalised outputs in V's stored basis
    log_sums,  # fp32 (requests, KV heads, splits, query rows): log2 of their softmax sums
    query_start,
    lengths,
    output,
    output_stride_token,
    output_stride_head,
    basis,  # this and what follows are fields of `Side` and `Reading`, of the values
    basis_stride_head,
    centre,
    value_scale,
    sinks,
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
    length = tl.load(lengths + request).to(tl.int32)
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
    chunk = chunk_tokens(first, length, lengths, query_start, requests, kv_heads, splits, programs, window, TILE)
    row = tl.arange(0, ROWS)
    used = row < count * SHAPE.GROUP
    high_score = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = ()
    for _ in tl.static_range(PARTS):
        out = out + (tl.zeros([ROWS, WIDTH], tl.float32),)
    base = ((request * kv_heads + head) * splits).to(tl.int64) * STORED + row
    for split in tl.range(0, tl.cdiv(length - first, chunk), num_stages=3):
        slot = base + split * STORED
        log_sum = tl.load(log_sums + slot, mask=used, other=float("-inf"))
        parts = load_parts(partial + slot[:, None] * PAGE.HEAD, used[:, None], V)
        new_high = tl.maximum(high_score, log_sum)
        shift = tl.where(new_high == float("-inf"), 0.0, new_high)
        decay = tl.exp2(high_score - shift)
        weight = tl.exp2(log_sum - shift)
        high_score = new_high
        total = total * decay + weight
        new_out = ()
        for part in tl.static_range(PARTS):
            new_out = new_out + (out[part] * decay[:, None] + parts[part] * weight[:, None],)
        out = new_out
    of_keys = total
    if sinks is not None:
        total = add_sink(sinks, head, high_score, total, SHAPE)
    total = tl.where(used, total, 1.0)
    normalised = ()
    for part in tl.static_range(PARTS):
        normalised = normalised + (out[part] / total[:, None],)
    at = output + start.to(tl.int64) * output_stride_token + head * SHAPE.GROUP * output_stride_head
    rows, stored = query_rows(at, output_stride_token, output_stride_head, count, SHAPE)
    share = of_keys / total
    store_output(normalised, share, rows, stored, head, basis, basis_stride_head, centre, value_scale, factor, V)
