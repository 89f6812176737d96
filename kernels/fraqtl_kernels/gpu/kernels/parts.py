"""Vectors as parts: 16-bit rounding and products, rotation, and loading and storing them.

A vector of head size D is held as 2 or 4 parts, the dimensions that one byte or word of its codes keeps together:
see `constexprs.VectorShape`, of which every VECTOR here is one. A part has COLUMNS columns, padded with zeros to WIDTH,
a power of two.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies bf16 wrongly and truncates when it converts to bf16: there the
# products are taken on the same numbers in fp32, and rounding to nearest even is spelled out.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_EMULATE = tl.constexpr(INTERPRETED)


@triton.jit
def round16(x, DTYPE: tl.constexpr):
    """fp32 -> DTYPE (fp16 or bf16), round to nearest even."""
    if _EMULATE and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + even) & -65536).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def dot16(a, b, acc):
    """acc + a @ b for 16-bit a, b on the tensor cores, accumulated in fp32 (never TF32)."""
    if _EMULATE:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, acc)


@triton.jit
def part_columns(VECTOR: tl.constexpr):
    """(columns of a part (1, WIDTH), which of them are real)."""
    WIDTH: tl.constexpr = VECTOR.WIDTH
    column = tl.arange(0, WIDTH)[None, :]
    return column, column < VECTOR.COLUMNS


@triton.jit
def load_parts(row, mask, VECTOR: tl.constexpr):
    """Parts of 16-bit or fp32 vectors in memory. row: (rows, 1) pointers to them; mask: (rows, 1)."""
    PARTS: tl.constexpr = VECTOR.PARTS
    column, real = part_columns(VECTOR)
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (tl.load(row + part * VECTOR.COLUMNS + column, mask=mask & real, other=0.0),)
    return parts


@triton.jit
def store_parts(row, parts, mask, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Write fp32 parts as DTYPE. row: (rows, 1) pointers; mask: (rows, 1)."""
    PARTS: tl.constexpr = VECTOR.PARTS
    column, real = part_columns(VECTOR)
    for part in tl.static_range(PARTS):
        rounded = parts[part] if DTYPE == tl.float32 else round16(parts[part], DTYPE)
        tl.store(row + part * VECTOR.COLUMNS + column, rounded, mask=mask & real)


@triton.jit
def rotate_parts(parts, basis, factor, VECTOR: tl.constexpr):
    """(rows, D) @ basis (D, D) · factor: 16-bit parts in, fp32 parts out."""
    PARTS: tl.constexpr = VECTOR.PARTS
    COLUMNS: tl.constexpr = VECTOR.COLUMNS
    WIDTH: tl.constexpr = VECTOR.WIDTH
    row = tl.arange(0, WIDTH)[:, None]
    column, real = part_columns(VECTOR)
    corner = basis + row * (PARTS * COLUMNS) + column
    mask = (row < COLUMNS) & real
    rotated = ()
    for to in tl.static_range(PARTS):
        total = tl.zeros([parts[0].shape[0], WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            piece = tl.load(corner + (part * COLUMNS * PARTS + to) * COLUMNS, mask=mask, other=0.0)
            total = dot16(parts[part], piece, total)
        rotated = rotated + (total * factor,)
    return rotated
