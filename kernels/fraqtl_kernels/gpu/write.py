"""Store keys and values into packed pages: rotate, centre, quantise, pack and scatter in one launch.

For every (token, KV head), with H the rotation and c the key centre (keys only):

    y = x H - c H,   scale = fp16(max|y| / 2^(bits-1)),   code = clamp(round(y / scale + midpoint), 0, 2^bits - 1)

the midpoint grid of `reference.quantise`, rounding half to even as it does. Sums of the rotation are
taken in fp32 over exact products, so codes equal the reference's except where y / scale lies within
fp32 rounding of the edge between two codes. A vector that holds NaN or infinity gets a NaN scale.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fraqtl_kernels.gpu.bases import Bases
from fraqtl_kernels.gpu.config import Tuning, check_dtype, vector_constants
from fraqtl_kernels.gpu.tiles import rotate_halves, round16
from fraqtl_kernels.pages import PageLayout

TOKENS = 16  # tokens a program: the M of the rotation's product
_LARGEST_SCALE = tl.constexpr(65504.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds half to even


@triton.jit
def quantise_half(y, scale, BITS: tl.constexpr):
    """Codes of (TOKENS, HALF) values as int32. scale: (TOKENS,) fp32, already rounded to fp16."""
    levels: tl.constexpr = 2**BITS - 1
    steps = y / scale[:, None] + levels / 2
    steps = tl.where(steps == steps, steps, 0.0)  # zero vectors (0 / 0) and broken ones
    steps = tl.minimum(tl.maximum(steps, -1.0), levels + 1.0)
    codes = (steps + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(codes, 0.0), levels * 1.0).to(tl.int32)


@triton.jit
def store_vectors(
    source,
    stride_token,
    basis,
    centre,
    factor,
    page,
    token,
    slot,
    used,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    RAW: tl.constexpr,
    CODE_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
):
    """Keys or values of one KV head. page: (TOKENS,) pointers to pages; slot: (TOKENS,) places within them."""
    column = tl.arange(0, HALF)[None, :]
    mask = used[:, None] & (column < HEAD // 2)
    at = source + token.to(tl.int64)[:, None] * stride_token + column
    raw_low = tl.load(at, mask=mask, other=0.0)
    raw_high = tl.load(at + HEAD // 2, mask=mask, other=0.0)
    row = (page + CODE_OFFSET + slot * (HEAD * BITS // 8))[:, None]
    if BITS == 16:
        place = row.to(tl.pointer_type(RAW)) + column
        if RAW == raw_low.dtype:
            tl.store(place, raw_low, mask=mask)
            tl.store(place + HEAD // 2, raw_high, mask=mask)
        else:
            tl.store(place, round16(raw_low.to(tl.float32), RAW), mask=mask)
            tl.store(place + HEAD // 2, round16(raw_high.to(tl.float32), RAW), mask=mask)
    else:
        if ROTATED:
            low, high = rotate_halves(raw_low, raw_high, basis, HEAD, HALF)
            low, high = low * factor, high * factor
        else:
            low, high = raw_low.to(tl.float32), raw_high.to(tl.float32)
        if HAS_CENTRE:
            low -= tl.load(centre + column, mask=column < HEAD // 2, other=0.0)
            high -= tl.load(centre + HEAD // 2 + column, mask=column < HEAD // 2, other=0.0)
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
        edge: tl.constexpr = 2 ** (BITS - 1)
        scale16 = tl.minimum(largest / edge, _LARGEST_SCALE).to(tl.float16)
        codes_low = quantise_half(low, scale16.to(tl.float32), BITS)
        codes_high = quantise_half(high, scale16.to(tl.float32), BITS)
        if BITS == 4:
            tl.store(row + column, (codes_low | (codes_high << 4)).to(tl.uint8), mask=mask)
        else:
            tl.store(row + column, codes_low.to(tl.uint8), mask=mask)
            tl.store(row + HEAD // 2 + column, codes_high.to(tl.uint8), mask=mask)
        # x · 0 is NaN for NaN and infinity: one sum finds both
        broken = tl.sum(low * 0.0 + high * 0.0, 1)
        scale16 = tl.where(broken == 0.0, scale16, float("nan")).to(tl.float16)
        tl.store((page + SCALE_OFFSET + slot * 2).to(tl.pointer_type(tl.float16)), scale16, mask=used)


@triton.jit(do_not_specialize=["tokens"])
def write_kernel(
    key,
    value,
    pool,
    slot_mapping,
    basis_k,
    basis_v,
    centre,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    pool_stride_block,
    pool_stride_head,
    tokens,
    factor,
    TOKENS: tl.constexpr,
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
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place = tl.load(slot_mapping + token, mask=token < tokens, other=-1)
    used = place >= 0
    place = tl.where(used, place, 0)
    page = pool + head.to(tl.int64) * pool_stride_head + (place // BLOCK_SIZE).to(tl.int64) * pool_stride_block
    slot = (place % BLOCK_SIZE).to(tl.int32)
    if tl.program_id(2) == 0:
        store_vectors(
            key + head * key_stride_head,
            key_stride_token,
            basis_k,
            centre + head * HEAD,
            factor,
            page,
            token,
            slot,
            used,
            HEAD,
            HALF,
            K_BITS,
            RAW,
            0,
            K_SCALE_OFFSET,
            K_ROTATED,
            HAS_CENTRE,
        )
    else:
        store_vectors(
            value + head * value_stride_head,
            value_stride_token,
            basis_v,
            centre,
            factor,
            page,
            token,
            slot,
            used,
            HEAD,
            HALF,
            V_BITS,
            RAW,
            V_OFFSET,
            V_SCALE_OFFSET,
            V_ROTATED,
            False,
        )


def write(
    pool: Tensor,
    layout: PageLayout,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    bases: Bases,
) -> None:
    """Store keys and values of a batch: same bytes as `reference.write`, see the module's docstring.

    pool: (blocks, KV heads, N, bytes) uint8, see `PageLayout.planes`. key, value: (tokens, KV heads, D) fp16 or
    bf16, last dimension contiguous. slot_mapping: (tokens or fewer,) block · N + offset; negative: skip.
    """
    check_dtype(key.dtype)
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("key and value must be contiguous in their last dimension")
    tokens = min(slot_mapping.shape[0], key.shape[0])
    if tokens == 0:
        return
    constants, tuning = vector_constants(layout, key.dtype), write_tuning(layout.head_size)
    write_kernel[(triton.cdiv(tokens, TOKENS), key.shape[1], 2)](
        key,
        value,
        pool,
        slot_mapping,
        key if bases.k is None else bases.k,
        value if bases.v is None else bases.v,
        key if bases.centre is None else bases.centre,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        pool.stride(0),
        pool.stride(1),
        tokens,
        bases.factor,
        TOKENS=TOKENS,
        K_ROTATED=layout.format.k.rotated,
        V_ROTATED=layout.format.v.rotated,
        HAS_CENTRE=bases.centre is not None,
        num_warps=tuning.warps,
        **({"maxnreg": tuning.registers} if tuning.registers else {}),
        **constants,
    )


def write_tuning(head_size: int) -> Tuning:
    """Launch shape. Without a cap on registers ptxas spills a few for an occupancy that nobody needs."""
    return Tuning(TOKENS, 4, 1, registers=128) if head_size <= 128 else Tuning(TOKENS, 8, 1)
