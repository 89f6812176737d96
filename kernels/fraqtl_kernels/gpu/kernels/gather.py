"""Dequantize cached tokens of some requests into a contiguous 16-bit workspace.

Values come back in the model's own basis,

    x = ((code - midpoint) R) · scale · factor + center

where code - midpoint and the matrix R back (see `operands.py`) are exact in 16 bits, so the only rounding is the last
one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.parts import part_columns, rotate_parts, round16, store_parts
from fraqtl_kernels.gpu.kernels.tiles import load_codes, load_scales


@triton.jit
def restore_vectors(
    page,  # (TILE,) pointers to pages
    slot,
    known,
    target,  # (TILE,) pointers to rows of the workspace
    basis,
    static_scale,  # this and the centers: pointers to the vector of the KV head, or None
    center,
    outlier_center,
    factor,
    VECTOR: tl.constexpr,
):
    """One tile of stored vectors to the workspace."""
    DTYPE: tl.constexpr = target.dtype.element_ty
    PARTS: tl.constexpr = VECTOR.PARTS
    column, real = part_columns(VECTOR)
    codes = load_codes(page + VECTOR.CODES + slot * VECTOR.ROW_BYTES, known, DTYPE, VECTOR, True, False)
    steps = ()
    for part in tl.static_range(PARTS):
        steps = steps + (tl.where(real, codes[part].to(tl.float32) - VECTOR.MIDPOINT, 0.0),)
    scales = load_scales(page, slot, known, VECTOR)
    if VECTOR.GROUPS > 1:
        # Scales that differ within a vector don't commute with the rotation: one more rounding
        scaled = ()
        for part in tl.static_range(PARTS):
            scaled = scaled + (steps[part] * scales[part].to(tl.float32)[:, None],)
        steps = scaled
    if VECTOR.ROTATED:
        rounded = ()
        for part in tl.static_range(PARTS):
            rounded = rounded + (round16(steps[part], DTYPE),)
        steps = rotate_parts(rounded, basis, factor, VECTOR)
    restored = ()
    for part in tl.static_range(PARTS):
        x = steps[part]
        if VECTOR.GROUPS == 1:
            x *= tl.abs(scales[0]).to(tl.float32)[:, None]
        if VECTOR.STATIC:
            x *= tl.load(static_scale + part * VECTOR.COLUMNS + column, mask=real, other=0.0)
        if center is not None:
            shift = tl.load(center + part * VECTOR.COLUMNS + column, mask=real, other=0.0)
            if outlier_center is not None:
                is_outlier = scales[0].to(tl.int16, bitcast=True) < 0
                outlier_shift = tl.load(outlier_center + part * VECTOR.COLUMNS + column, mask=real, other=0.0)
                shift = tl.where(is_outlier[:, None], outlier_shift, shift)
            x += shift
        restored = restored + (x,)
    store_parts(target[:, None], restored, known[:, None], DTYPE, VECTOR)


# The rows of a pass are a slice of the batch's block table: where they begin must not decide what is compiled.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_table", "first", "target_start"])
def workspace_kernel(
    pool,
    pool_stride_block,
    pool_stride_head,
    block_table,
    table_stride,
    first,
    target_start,
    key,
    key_stride_token,
    key_stride_head,
    value,
    value_stride_token,
    value_stride_head,
    basis_key,  # these and what follows are fields of `StreamOperands` and `ReadOperands`
    basis_key_stride_head,
    basis_value,
    basis_value_stride_head,
    key_scale,
    value_scale,
    key_center,
    key_outlier_center,
    value_center,
    key_factor,
    value_factor,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    request, head = tl.program_id(1), tl.program_id(2) // 2
    start = tl.load(target_start + request).to(tl.int64)
    count = tl.load(target_start + request + 1).to(tl.int64) - start
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if tl.program_id(0) * TILE >= count:
        return
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    known = index < count
    token = tl.load(first + request).to(tl.int32) + index
    block = tl.load(block_table + request.to(tl.int64) * table_stride + token // PAGE.BLOCK_SIZE, mask=known, other=0)
    page = pool + head.to(tl.int64) * pool_stride_head + block.to(tl.int64) * pool_stride_block
    slot = token % PAGE.BLOCK_SIZE
    vector = head * PAGE.HEAD
    if tl.program_id(2) % 2 == 0:
        restore_vectors(
            page,
            slot,
            known,
            key + (start + index) * key_stride_token + head * key_stride_head,
            None if basis_key is None else basis_key + head * basis_key_stride_head,
            None if key_scale is None else key_scale + vector,
            None if key_center is None else key_center + vector,
            None if key_outlier_center is None else key_outlier_center + vector,
            key_factor,
            K,
        )
    else:
        restore_vectors(
            page,
            slot,
            known,
            value + (start + index) * value_stride_token + head * value_stride_head,
            None if basis_value is None else basis_value + head * basis_value_stride_head,
            None if value_scale is None else value_scale + vector,
            None if value_center is None else value_center + vector,
            None,
            value_factor,
            V,
        )
