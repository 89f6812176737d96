"""Dequantise cached tokens of some requests into a contiguous 16-bit workspace.

For prefill behind a cached prefix: flash attention then reads the workspace next to the raw keys and
values of the chunk. Values come back in the model's own basis,

    x = ((code - midpoint) H^T) · scale / sqrt(D) + centre (keys only)

where code - midpoint is exact in 16 bits, so the only rounding is the last one. A caller bounds the
workspace by calling it for a range of tokens of each request at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.config import check_dtype, vector_constants
from fraqtl_kernels.gpu.tiles import load_halves, load_scales, rotate_halves, round16
from fraqtl_kernels.pages import PageLayout

TILE = 32


@triton.jit
def restore_vectors(
    row,
    page,
    slot,
    known,
    basis,
    centre,
    factor,
    target,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    RAW: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
):
    """One tile of stored vectors to `target`, (TILE,) pointers to rows of the workspace."""
    column = tl.arange(0, HALF)[None, :]
    mask = known[:, None] & (column < HEAD // 2)
    low, high = load_halves(row, known, BITS, RAW, DTYPE, HEAD, HALF, True, False)
    low, high = low.to(tl.float32), high.to(tl.float32)
    if BITS < 16:
        midpoint: tl.constexpr = (2**BITS - 1) / 2
        inside = column < HEAD // 2
        low, high = tl.where(inside, low - midpoint, 0.0), tl.where(inside, high - midpoint, 0.0)
        if ROTATED:
            low, high = rotate_halves(round16(low, DTYPE), round16(high, DTYPE), basis, HEAD, HALF)
            low, high = low * factor, high * factor
        scale = load_scales(page + SCALE_OFFSET, slot, known).to(tl.float32)[:, None]
        low, high = low * scale, high * scale
        if HAS_CENTRE:
            low += tl.load(centre + column, mask=column < HEAD // 2, other=0.0)
            high += tl.load(centre + HEAD // 2 + column, mask=column < HEAD // 2, other=0.0)
    at = target[:, None] + column
    tl.store(at, round16(low, DTYPE), mask=mask)
    tl.store(at + HEAD // 2, round16(high, DTYPE), mask=mask)


@triton.jit
def workspace_kernel(
    pool,
    block_table,
    first,
    target_start,
    key,
    value,
    basis_k,
    basis_v,
    centre,
    pool_stride_block,
    pool_stride_head,
    table_stride,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    factor,
    TILE: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    RAW: tl.constexpr,
    V_OFFSET: tl.constexpr,
    K_SCALE_OFFSET: tl.constexpr,
    V_SCALE_OFFSET: tl.constexpr,
    K_ROTATED: tl.constexpr,
    V_ROTATED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
):
    request, head = tl.program_id(1), tl.program_id(2) // 2
    start = tl.load(target_start + request).to(tl.int64)
    count = tl.load(target_start + request + 1).to(tl.int64) - start
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if tl.program_id(0) * TILE >= count:
        return
    known = index < count
    token = tl.load(first + request).to(tl.int32) + index
    block = tl.load(block_table + request.to(tl.int64) * table_stride + token // BLOCK_SIZE, mask=known, other=0)
    page = pool + head.to(tl.int64) * pool_stride_head + block.to(tl.int64) * pool_stride_block
    slot = token % BLOCK_SIZE
    if tl.program_id(2) % 2 == 0:
        restore_vectors(
            page + slot * (HEAD * K_BITS // 8),
            page,
            slot,
            known,
            basis_k,
            centre + head * HEAD,
            factor,
            key + (start + index) * key_stride_token + head * key_stride_head,
            HEAD,
            HALF,
            K_BITS,
            RAW,
            key.dtype.element_ty,
            K_SCALE_OFFSET,
            K_ROTATED,
            HAS_CENTRE,
        )
    else:
        restore_vectors(
            page + V_OFFSET + slot * (HEAD * V_BITS // 8),
            page,
            slot,
            known,
            basis_v,
            centre,
            factor,
            value + (start + index) * value_stride_token + head * value_stride_head,
            HEAD,
            HALF,
            V_BITS,
            RAW,
            value.dtype.element_ty,
            V_SCALE_OFFSET,
            V_ROTATED,
            False,
        )


def dequantise(
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    first: Tensor,
    target_start: Tensor,
    longest: int,
    key: Tensor,
    value: Tensor,
    bases: Bases,
    key_centre: Tensor | None = None,
) -> None:
    """Write tokens [first[r], first[r] + n_r) of every request r to rows target_start[r] ... of key and value.

    first: (requests,) int. target_start: (requests + 1,) int, so n_r = target_start[r+1] - target_start[r] (0 skips
    a request); longest: a bound on n_r. key, value: (rows, KV heads, D) fp16 or bf16, last dimension contiguous.
    key_centre: (KV heads, D) fp32, the centre in the model's own basis, added to keys.
    """
    check_dtype(key.dtype)
    if longest <= 0:
        return
    workspace_kernel[(triton.cdiv(longest, TILE), first.shape[0], 2 * pool.shape[1])](
        pool,
        block_table,
        first,
        target_start,
        key,
        value,
        key if bases.k_inverse is None else bases.k_inverse,
        value if bases.v_inverse is None else bases.v_inverse,
        key if key_centre is None else key_centre,
        pool.stride(0),
        pool.stride(1),
        block_table.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        bases.factor,
        TILE=TILE,
        K_ROTATED=layout.format.k.rotated,
        V_ROTATED=layout.format.v.rotated,
        HAS_CENTRE=key_centre is not None,
        num_warps=4,
        **vector_constants(layout, key.dtype),
    )
