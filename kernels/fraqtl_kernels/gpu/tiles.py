"""What all kernels share: 16-bit rounding and products, rotation, and reading a tile of pages.

A vector of head size D is held as 2 or 4 parts, the dimensions that one byte or word of its codes keeps together:
see `config.VectorShape`, of which every VECTOR here is one. A part has COLUMNS columns, padded with zeros to WIDTH, a
power of two.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from fraqtl_kernels.gpu.unpack import unpack_bytes, unpack_nibbles, unpack_pairs, unpack_words

# Triton's interpreter multiplies bf16 wrongly and truncates when it converts to bf16: there the
# products are taken on the same numbers in fp32, and rounding to nearest even is spelled out.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_EMULATE = tl.constexpr(INTERPRETED)

TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


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


@triton.jit
def load_codes(
    row,
    token_mask,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PTX: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """One tile of stored vectors as (TILE, WIDTH) parts in DTYPE, plus the bias of `unpack.zero_points`.

    row: (TILE,) pointers to the first byte of each vector. token_mask: (TILE,) for raw vectors, which hold
    anything (NaN too) where nothing was written. SYMMETRIC: as in `unpack_nibbles`. TRANSPOSED: as (WIDTH, TILE) parts,
    loaded so: a transpose of what was loaded keeps Triton from unpacking where the product wants its operand.
    """
    WIDTH: tl.constexpr = VECTOR.WIDTH
    column = tl.arange(0, WIDTH)[:, None] if TRANSPOSED else tl.arange(0, WIDTH)[None, :]
    row = row[None, :] if TRANSPOSED else row[:, None]
    real = column < VECTOR.COLUMNS
    if VECTOR.BITS == 16:
        RAW: tl.constexpr = VECTOR.RAW
        at = row.to(tl.pointer_type(RAW)) + column
        known = real & (token_mask[None, :] if TRANSPOSED else token_mask[:, None])
        low = tl.load(at, mask=known, other=0.0)
        high = tl.load(at + VECTOR.COLUMNS, mask=known, other=0.0)
        if RAW == DTYPE:
            return low, high
        else:
            return round16(low.to(tl.float32), DTYPE), round16(high.to(tl.float32), DTYPE)
    elif VECTOR.WORDS:
        words = load_packed(row.to(tl.pointer_type(tl.uint16)) + column, real, VECTOR)
        return unpack_words(words, DTYPE, SYMMETRIC, PTX)
    elif VECTOR.BITS == 8:
        low = load_packed(row + column, real, VECTOR)
        high = load_packed(row + VECTOR.COLUMNS + column, real, VECTOR)
        return unpack_bytes(low, DTYPE, PTX), unpack_bytes(high, DTYPE, PTX)
    else:
        codes = load_packed(row + column, real, VECTOR)
        if VECTOR.BITS == 4:
            return unpack_nibbles(codes, DTYPE, SYMMETRIC, PTX)
        else:
            return unpack_pairs(codes, DTYPE, PTX)


@triton.jit
def load_packed(at, real, VECTOR: tl.constexpr):
    """A tile of packed bytes or words, without a mask where no column is padding."""
    if VECTOR.COLUMNS == VECTOR.WIDTH:
        return tl.load(at)
    else:
        return tl.load(at, mask=real, other=0)


@triton.jit
def load_scales(page, slot, mask, VECTOR: tl.constexpr):
    """(TILE,) fp16 scales of every group, zero where masked; one of zeros if the vector has none.

    page: pointer(s) to pages. slot: tokens of the block.
    """
    GROUPS: tl.constexpr = VECTOR.GROUPS
    scales = ()
    for group in tl.static_range(GROUPS):
        at = (page + VECTOR.SCALES + slot * (2 * GROUPS) + 2 * group).to(tl.pointer_type(tl.float16))
        scales = scales + (tl.load(at, mask=mask, other=0.0),)
    if GROUPS == 0:
        scales = (tl.zeros(slot.shape, tl.float16),)
    return scales
