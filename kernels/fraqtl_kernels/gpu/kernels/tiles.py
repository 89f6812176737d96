"""Tiles of pages: their block numbers, codes and scales. Every VECTOR here is a `constexprs.VectorShape`."""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.parts import round16
from fraqtl_kernels.gpu.kernels.unpack import unpack_bytes, unpack_nibbles, unpack_pairs, unpack_triples, unpack_words


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
    """One tile of stored vectors as (TILE, WIDTH) parts in DTYPE, plus the bias of `constexprs.zero_points`.

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
    elif VECTOR.BITS == 3:
        HALF: tl.constexpr = VECTOR.COLUMNS // 2
        lower = load_packed(row + column, real, VECTOR)
        upper = load_packed(row + VECTOR.COLUMNS + column % HALF, real, VECTOR)
        return unpack_triples(lower, upper, tl.broadcast_to(column >= HALF, lower.shape), DTYPE, PTX)
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


@triton.jit
def load_blocks(table_row, start, last, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Block number(s) of the tile at `start`: one if a block holds the tile, else (TILE,). Block 0 past the end."""
    if PAGE.BLOCK_SIZE % TILE == 0:
        return tl.load(table_row + start // PAGE.BLOCK_SIZE, mask=start < last, other=0)
    else:
        token = start + tl.arange(0, TILE)
        return tl.load(table_row + token // PAGE.BLOCK_SIZE, mask=token < last, other=0)


@triton.jit
def load_tile_scales(pool_head, block, stride_block, start, last, oldest, PAGE: tl.constexpr, TILE: tl.constexpr):
    """fp16 scales (TILE,) of keys, and of values by group, of the tile at `start`; zero outside [oldest, last)."""
    token = start + tl.arange(0, TILE)
    known = (token < last) & (token >= oldest)
    page = pool_head + block.to(tl.int64) * stride_block
    slot = token % PAGE.BLOCK_SIZE
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    return load_scales(page, slot, known, K)[0], load_scales(page, slot, known, V)
