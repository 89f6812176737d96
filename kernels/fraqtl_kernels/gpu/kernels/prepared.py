"""Queries in the basis of the stored keys, made once for all splits of the transposed form, and read by them."""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.parts import part_columns
from fraqtl_kernels.gpu.kernels.queries import load_query, query_rows
from fraqtl_kernels.gpu.kernels.softmax import LOG2E

TERMS = tl.constexpr(3)  # of a prepared query: zero points · sum(q), q·center, q·shift


@triton.jit
def prepare_kernel(
    query,  # (tokens, query heads, D)
    query_stride_token,
    query_stride_head,
    query_start,
    prepared,  # 16 bits (requests, KV heads, columns, D): queries in the stored basis, scaled
    terms,  # fp32 (requests, KV heads, columns, TERMS)
    basis,
    basis_stride_head,
    key_scale,
    center,
    outlier_shift,
    scale,
    key_factor,
    BASE_2: tl.constexpr,  # whether scores are in units of log2 from the start
    PAGE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    request, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_start + request).to(tl.int64)
    count = tl.load(query_start + request + 1).to(tl.int32) - start.to(tl.int32)
    if count <= 0:  # padding of a CUDA graph
        return
    K: tl.constexpr = PAGE.K
    DTYPE: tl.constexpr = prepared.dtype.element_ty
    if BASE_2:
        scale *= LOG2E
    at = query + start * query_stride_token + head * SHAPE.GROUP * query_stride_head
    rows, used = query_rows(at, query_stride_token, query_stride_head, count, SHAPE)
    parts, zero, constant, shift = load_query(
        rows, used, head, basis, basis_stride_head, key_scale, center, outlier_shift, scale, key_factor, K, DTYPE
    )
    row = tl.arange(0, SHAPE.ROWS)
    stored = row < SHAPE.COLUMNS
    slot = (request * tl.num_programs(1) + head).to(tl.int64) * SHAPE.COLUMNS + row
    column, real = part_columns(K)
    KEY_PARTS: tl.constexpr = K.PARTS
    for part in tl.static_range(KEY_PARTS):
        at = prepared + slot[:, None] * PAGE.HEAD + part * K.COLUMNS + column
        tl.store(at, parts[part], mask=stored[:, None] & real)
    tl.store(terms + slot * TERMS, zero, mask=stored)
    tl.store(terms + slot * TERMS + 1, constant, mask=stored)
    tl.store(terms + slot * TERMS + 2, shift, mask=stored)


@triton.jit
def load_prepared(prepared, terms, slot, PAGE: tl.constexpr, SHAPE: tl.constexpr):
    """Parts (WIDTH, COLUMNS) of the queries of one request and KV head, and their terms (COLUMNS,)."""
    K: tl.constexpr = PAGE.K
    KEY_PARTS: tl.constexpr = K.PARTS
    row = tl.arange(0, K.WIDTH)[:, None]
    query = slot * SHAPE.COLUMNS + tl.arange(0, SHAPE.COLUMNS)
    parts = ()
    for part in tl.static_range(KEY_PARTS):
        at = prepared + query[None, :] * PAGE.HEAD + part * K.COLUMNS + row
        parts = parts + (tl.load(at, mask=row < K.COLUMNS, other=0.0),)
    at = terms + query * TERMS
    return parts, tl.load(at), tl.load(at + 1), tl.load(at + 2)
