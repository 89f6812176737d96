"""Merge the splits of a decode batch: the second launch of `decode.py`.

    out = (Σ_s 2^(l_s - m) · out_s) / (Σ_s 2^(l_s - m) [+ exp(sink) · 2^-m]),   m = max_s l_s

over the splits that have a chunk, then the inverse rotation of V and the output dtype. One program
per (request, KV head) takes all its query rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.gpu.attention import add_sink, store_rows
from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.config import half_of
from fraqtl_kernels.gpu.splits import DecodePlan, chunk_tokens, oldest_visible
from fraqtl_kernels.pages import PageLayout


@triton.jit(do_not_specialize=["requests", "splits", "programs", "window"])
def combine_kernel(
    partial,
    log_sums,
    query_start,
    lengths,
    output,
    basis_output,
    sinks,
    output_stride_token,
    output_stride_head,
    requests,
    splits,
    programs,
    window,
    factor,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    V_ROTATED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    request, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    length = tl.load(lengths + request).to(tl.int32)
    start = tl.load(query_start + request).to(tl.int32)
    count = tl.load(query_start + request + 1).to(tl.int32) - start
    if count <= 0:
        return
    oldest = oldest_visible(length, count, window, HAS_WINDOW)
    first = oldest // TILE * TILE
    chunk = chunk_tokens(
        first, length, lengths, query_start, requests, kv_heads, splits, programs, window, HAS_WINDOW, TILE
    )
    used_splits = tl.cdiv(length - first, chunk)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HALF)[None, :]
    used = row < count * GROUP
    mask = used[:, None] & (column < HEAD // 2)
    high_score = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low = tl.zeros([ROWS, HALF], tl.float32)
    high = tl.zeros([ROWS, HALF], tl.float32)
    base = ((request * kv_heads + head) * splits).to(tl.int64) * (GROUP * QUERIES) + row
    for split in tl.range(0, used_splits, num_stages=3):
        slot = base + split * (GROUP * QUERIES)
        log_sum = tl.load(log_sums + slot, mask=used, other=float("-inf"))
        at = partial + slot[:, None] * HEAD + column
        part_low = tl.load(at, mask=mask, other=0.0)
        part_high = tl.load(at + HEAD // 2, mask=mask, other=0.0)
        new_high = tl.maximum(high_score, log_sum)
        shift = tl.where(new_high == float("-inf"), 0.0, new_high)
        decay = tl.exp2(high_score - shift)
        weight = tl.exp2(log_sum - shift)
        high_score = new_high
        total = total * decay + weight
        low = low * decay[:, None] + part_low * weight[:, None]
        high = high * decay[:, None] + part_high * weight[:, None]
    if HAS_SINKS:
        total = add_sink(sinks + head * GROUP, high_score, total, GROUP, ROWS)
    inverse = 1 / tl.where(used, total, 1.0)
    store_rows(
        low * inverse[:, None],
        high * inverse[:, None],
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


def combine(
    partial: Tensor,
    log_sums: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    output: Tensor,
    plan: DecodePlan,
    layout: PageLayout,
    bases: Bases,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Merge what `decode_kernel` left in scratch into `output`.

    partial: flat fp32, (requests, KV heads, splits, query rows, D) normalised outputs in V's stored
    basis. log_sums: flat fp32, (requests, KV heads, splits, query rows), log2 of their softmax sums.
    The rest as for `decode.decode`.
    """
    combine_kernel[(lengths.shape[0], plan.kv_heads)](
        partial,
        log_sums,
        query_start,
        lengths,
        output,
        output if bases.v_inverse is None else bases.v_inverse,
        output if sinks is None else sinks,
        output.stride(0),
        output.stride(1),
        lengths.shape[0],
        plan.splits,
        plan.programs,
        window or 0,
        bases.factor,
        QUERIES=plan.queries,
        GROUP=plan.group,
        ROWS=plan.rows,
        TILE=plan.tuning.tile,
        HEAD=layout.head_size,
        HALF=half_of(layout.head_size),
        V_ROTATED=layout.format.v.rotated,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        num_warps=4,
    )
