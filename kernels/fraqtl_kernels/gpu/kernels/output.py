"""Outputs of attention on their way out of the basis of the stored values."""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.parts import part_columns, rotate_parts, round16, store_parts


@triton.jit
def store_output(
    parts, weight_share, rows, used, head, basis, basis_stride_head, center, value_scale, factor, V: tl.constexpr
):
    """Carry fp32 parts of the attention output back into the model's basis and store them.

    weight_share: (rows,) the weights of all keys together, less than 1 with sink logits. rows, used: `query_rows`.
    basis, center, value_scale: of all heads.
    """
    DTYPE: tl.constexpr = rows.dtype.element_ty
    PARTS: tl.constexpr = V.PARTS
    column, real = part_columns(V)
    if V.ROTATED:
        rounded = ()
        for part in tl.static_range(PARTS):
            rounded = rounded + (round16(parts[part], DTYPE),)
        parts = rotate_parts(rounded, basis + head * basis_stride_head, factor, V)
    if V.STATIC:
        scaled = ()
        for part in tl.static_range(PARTS):
            at = value_scale + (head * PARTS + part) * V.COLUMNS + column
            scaled = scaled + (parts[part] * tl.load(at, mask=real, other=0.0),)
        parts = scaled
    if center is not None:
        moved = ()
        for part in tl.static_range(PARTS):
            at = center + (head * PARTS + part) * V.COLUMNS + column
            moved = moved + (parts[part] + weight_share[:, None] * tl.load(at, mask=real, other=0.0),)
        parts = moved
    store_parts(rows, parts, used, DTYPE, V)
