"""What all kernels share: 16-bit rounding and products, rotation, and reading a tile of pages.

A vector of head size D is held as two halves of D/2 columns, padded with zeros to HALF, a power of
two. For 4-bit vectors these are the low and the high nibbles of the same bytes.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from fraqtl_kernels.gpu.unpack import unpack_bytes, unpack_nibbles

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
def rotate_halves(low, high, basis, HEAD: tl.constexpr, HALF: tl.constexpr):
    """(rows, D) @ basis (D, D), in halves: 16-bit (rows, HALF) pairs in, fp32 pairs out."""
    row = tl.arange(0, HALF)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = (row < HEAD // 2) & (column < HEAD // 2)
    corner = basis + row * HEAD + column
    zero = tl.zeros([low.shape[0], HALF], tl.float32)
    out_low = dot16(low, tl.load(corner, mask=mask, other=0.0), zero)
    out_low = dot16(high, tl.load(corner + HEAD // 2 * HEAD, mask=mask, other=0.0), out_low)
    out_high = dot16(low, tl.load(corner + HEAD // 2, mask=mask, other=0.0), zero)
    out_high = dot16(high, tl.load(corner + HEAD // 2 * HEAD + HEAD // 2, mask=mask, other=0.0), out_high)
    return out_low, out_high


@triton.jit
def load_halves(
    row,
    token_mask,
    BITS: tl.constexpr,
    RAW: tl.constexpr,
    DTYPE: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    CENTRED: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile of stored vectors as two (TILE, HALF) halves in DTYPE, plus the bias of `unpack.zero_points`.

    row: (TILE,) pointers to the first byte of each vector. RAW: the 16-bit dtype of raw vectors.
    token_mask: (TILE,) for raw vectors, which hold anything (NaN too) where nothing was written.
    """
    column = tl.arange(0, HALF)[None, :]
    at = row[:, None] + column
    if BITS == 4:
        if HALF == HEAD // 2:
            codes = tl.load(at)
        else:
            codes = tl.load(at, mask=column < HEAD // 2, other=0)
        return unpack_nibbles(codes, DTYPE, CENTRED, PTX)
    elif BITS == 8:
        if HALF == HEAD // 2:
            low = tl.load(at)
            high = tl.load(at + HEAD // 2)
        else:
            low = tl.load(at, mask=column < HEAD // 2, other=0)
            high = tl.load(at + HEAD // 2, mask=column < HEAD // 2, other=0)
        return unpack_bytes(low, DTYPE, PTX), unpack_bytes(high, DTYPE, PTX)
    else:
        at = row.to(tl.pointer_type(RAW))[:, None] + column
        mask = token_mask[:, None] & (column < HEAD // 2)
        low = tl.load(at, mask=mask, other=0.0)
        high = tl.load(at + HEAD // 2, mask=mask, other=0.0)
        return _convert(low, RAW, DTYPE), _convert(high, RAW, DTYPE)


@triton.jit
def _convert(x, RAW: tl.constexpr, DTYPE: tl.constexpr):
    if RAW == DTYPE:
        return x
    else:
        return round16(x.to(tl.float32), DTYPE)


@triton.jit
def load_scales(plane, slot, mask):
    """(TILE,) fp16 scales, zero where masked. plane: pointer(s) to the scales of pages, slot: token of the block."""
    return tl.load((plane + slot * 2).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0)
