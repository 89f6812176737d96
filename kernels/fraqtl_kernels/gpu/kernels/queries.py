"""Queries on their way into a product: rows of a KV head, carried into the basis of the stored keys.

Row m is query token m // GROUP and query head m % GROUP of one KV head, so all query heads of a KV head read the codes
once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.parts import load_parts, part_columns, rotate_parts, round16


@triton.jit
def query_rows(pointer, stride_token, stride_head, count, SHAPE: tl.constexpr):
    """(ROWS, 1) pointers to the rows of a tile of query tokens, and which of them there are. pointer: to the first."""
    ROWS: tl.constexpr = SHAPE.ROWS
    row = tl.arange(0, ROWS)[:, None]
    at = pointer + (row // SHAPE.GROUP).to(tl.int64) * stride_token + (row % SHAPE.GROUP) * stride_head
    return at, row // SHAPE.GROUP < count


@triton.jit
def dot_vector(parts, vector, VECTOR: tl.constexpr):
    """(rows,) products of fp32 parts with a vector (D,) in memory; None: zeros."""
    total = tl.zeros([parts[0].shape[0]], tl.float32)
    if vector is not None:
        column, real = part_columns(VECTOR)
        PARTS: tl.constexpr = VECTOR.PARTS
        for part in tl.static_range(PARTS):
            piece = tl.load(vector + part * VECTOR.COLUMNS + column, mask=real, other=0.0)
            total += tl.sum(parts[part] * piece, 1)
    return total


@triton.jit
def load_query(
    rows,  # of `query_rows`
    used,
    head,
    basis,
    basis_stride_head,
    key_scale,
    center,
    outlier_shift,
    scale,
    factor,
    VECTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Parts of the rotated, scaled query in DTYPE; z_k · sum(q), q·center and q·shift of every row in fp32.

    scale: softmax scale (and log2(e) without soft-cap). The rest as for `decode.attend_kernel`.
    """
    PARTS: tl.constexpr = VECTOR.PARTS
    raw = load_parts(rows, used, VECTOR)
    if VECTOR.ROTATED:
        parts = rotate_parts(raw, basis + head * basis_stride_head, factor * scale, VECTOR)
    else:
        parts = ()
        for part in tl.static_range(PARTS):
            parts = parts + (raw[part].to(tl.float32) * scale,)
    vector = head * (PARTS * VECTOR.COLUMNS)
    if VECTOR.STATIC:
        column, real = part_columns(VECTOR)
        scaled = ()
        for part in tl.static_range(PARTS):
            at = key_scale + vector + part * VECTOR.COLUMNS + column
            scaled = scaled + (parts[part] * tl.load(at, mask=real, other=0.0),)
        parts = scaled
    constant = dot_vector(parts, None if center is None else center + vector, VECTOR)
    shift = dot_vector(parts, None if outlier_shift is None else outlier_shift + vector, VECTOR)
    rounded = ()
    zero = tl.zeros([parts[0].shape[0]], tl.float32)
    for part in tl.static_range(PARTS):
        rounded = rounded + (round16(parts[part], DTYPE),)
        # Of the rounded query, so that the bias cancels exactly
        zero += tl.sum(rounded[part].to(tl.float32), 1) * VECTOR.ZEROS[part]
    return rounded, zero, constant, shift
