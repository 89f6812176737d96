"""The inner loop of decode and prefill: online-softmax attention of some query rows over tiles of pages.

With stored codes c, scale s and zero point z (midpoint plus unpack bias, see `unpack.py`):

    score_j = k_scale_j · (q·c_j - z_k · sum(q))        key scale on the scores
    out     = Σ_j (p_j v_scale_j) · c_j - z_v · Σ_j p_j v_scale_j      value scale on the weights

so no element of the cache is ever multiplied. Queries arrive scaled by softmax scale · log2(e):
weights are powers of two, exp2(score - running maximum) (Milakov & Gimelshein, arXiv 1805.02867).

Rows: row m is query token m // GROUP and query head m % GROUP of one KV head, so all query heads of
a KV head read the codes once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.tiles import dot16, load_halves, load_scales, rotate_halves, round16

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_query(
    query,  # pointer to the first query token and head of the tile
    stride_token,
    stride_head,
    count,  # query tokens of the tile
    basis,
    centre,  # pointer to the centre of the KV head
    factor,  # softmax scale (and log2(e) without soft-cap), and 1/sqrt(D) with a rotation
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    ZERO_LOW: tl.constexpr,
    ZERO_HIGH: tl.constexpr,
):
    """(ROWS, HALF) halves of the rotated, scaled query in DTYPE; z_k · sum(q) and q·centre of every row, fp32."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    mask = ((row // GROUP) < count)[:, None] & (column < HEAD // 2)[None, :]
    at = query + ((row // GROUP).to(tl.int64) * stride_token + (row % GROUP) * stride_head)[:, None] + column[None, :]
    raw_low = tl.load(at, mask=mask, other=0.0)
    raw_high = tl.load(at + HEAD // 2, mask=mask, other=0.0)
    if ROTATED:
        low, high = rotate_halves(raw_low, raw_high, basis, HEAD, HALF)
    else:
        low, high = raw_low.to(tl.float32), raw_high.to(tl.float32)
    low, high = low * factor, high * factor
    constant = tl.zeros([ROWS], tl.float32)
    if HAS_CENTRE:
        c_low = tl.load(centre + column, mask=column < HEAD // 2, other=0.0)
        c_high = tl.load(centre + HEAD // 2 + column, mask=column < HEAD // 2, other=0.0)
        constant = tl.sum(low * c_low[None, :] + high * c_high[None, :], 1)
    q_low, q_high = round16(low, DTYPE), round16(high, DTYPE)
    # Of the rounded query, so that the bias cancels exactly
    zero = tl.sum(q_low.to(tl.float32) * ZERO_LOW + q_high.to(tl.float32) * ZERO_HIGH, 1)
    return q_low, q_high, zero, constant


@triton.jit
def load_blocks(table_row, start, last, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block number(s) of the tile at `start`: one if a block holds the tile, else (TILE,). Block 0 past the end."""
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table_row + start // BLOCK_SIZE, mask=start < last, other=0)
    else:
        token = start + tl.arange(0, TILE)
        return tl.load(table_row + token // BLOCK_SIZE, mask=token < last, other=0)


@triton.jit
def load_tile_scales(
    pool_head,
    block,
    stride_block,
    start,
    last,
    oldest,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_SCALE_OFFSET: tl.constexpr,
    V_SCALE_OFFSET: tl.constexpr,
):
    """(TILE,) fp16 scales of keys and values of the tile at `start`; zero outside [oldest, last), and if raw."""
    token = start + tl.arange(0, TILE)
    known = (token < last) & (token >= oldest)
    page = pool_head + block.to(tl.int64) * stride_block
    k_scale = tl.zeros([TILE], tl.float16)
    v_scale = tl.zeros([TILE], tl.float16)
    if K_BITS < 16:
        k_scale = load_scales(page + K_SCALE_OFFSET, token % BLOCK_SIZE, known)
    if V_BITS < 16:
        v_scale = load_scales(page + V_SCALE_OFFSET, token % BLOCK_SIZE, known)
    return k_scale, v_scale


@triton.jit
def attend_tiles(
    q_low,
    q_high,
    q_zero,
    q_constant,
    position,  # (ROWS,) position of each row's query token
    first,  # first token, a multiple of TILE
    last,  # one past the last token
    oldest,  # tokens before it are seen by no row, and their blocks may be freed
    table_row,  # block numbers of the request
    pool_head,  # pointer to the page of block 0 and this KV head
    stride_block,
    window,
    soft_cap,
    ROWS: tl.constexpr,
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
    V_ZERO: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DEFERRED: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of the rows over tokens [first, last): (output low, high, maximum, sum), not normalised.

    The maximum is in units of log2. DEFERRED keeps row sums per column of the tile and adds them up after the
    loop: no reduction across threads inside it, for registers.
    """
    DTYPE: tl.constexpr = q_low.dtype
    index = tl.arange(0, TILE)
    high_score = tl.full([ROWS], float("-inf"), tl.float32)
    if DEFERRED:
        total = tl.zeros([ROWS, TILE], tl.float32)
        weight_sum = tl.zeros([ROWS, TILE], tl.float32)
    else:
        total = tl.zeros([ROWS], tl.float32)
        weight_sum = tl.zeros([ROWS], tl.float32)
    out_low = tl.zeros([ROWS, HALF], tl.float32)
    out_high = tl.zeros([ROWS, HALF], tl.float32)
    # Triton pipelines the codes and their block numbers (STAGES apart over two levels of loads), but no loads of
    # 2 bytes: the scales of a tile are loaded one tile ahead by hand, from block numbers loaded two tiles ahead.
    block = load_blocks(table_row, first, last, BLOCK_SIZE, TILE)
    next_block = load_blocks(table_row, first + TILE, last, BLOCK_SIZE, TILE)
    k_scale, v_scale = load_tile_scales(
        pool_head,
        block,
        stride_block,
        first,
        last,
        oldest,
        BLOCK_SIZE,
        TILE,
        K_BITS,
        V_BITS,
        K_SCALE_OFFSET,
        V_SCALE_OFFSET,
    )
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        token = start + index
        known = (token < last) & (token >= oldest)
        next_k_scale, next_v_scale = load_tile_scales(
            pool_head,
            next_block,
            stride_block,
            start + TILE,
            last,
            oldest,
            BLOCK_SIZE,
            TILE,
            K_BITS,
            V_BITS,
            K_SCALE_OFFSET,
            V_SCALE_OFFSET,
        )
        next_block = load_blocks(table_row, start + 2 * TILE, last, BLOCK_SIZE, TILE)
        block = load_blocks(table_row, start, last, BLOCK_SIZE, TILE)
        page = pool_head + block.to(tl.int64) * stride_block
        slot = start % BLOCK_SIZE + index if BLOCK_SIZE % TILE == 0 else token % BLOCK_SIZE
        k_low, k_high = load_halves(
            page + slot * (HEAD * K_BITS // 8), known, K_BITS, RAW, DTYPE, HEAD, HALF, False, PTX
        )
        scores = tl.zeros([ROWS, TILE], tl.float32)
        scores = dot16(q_low, tl.trans(k_low), scores)
        scores = dot16(q_high, tl.trans(k_high), scores)
        if K_BITS < 16:
            scores = (scores - q_zero[:, None]) * k_scale.to(tl.float32)[None, :]
        if HAS_CENTRE:
            scores += q_constant[:, None]
        if HAS_CAP:
            # cap · tanh(s / cap) in units of log2, with tanh(x) = 1 - 2 / (exp(2x) + 1)
            scores = soft_cap * LOG2E * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / soft_cap)) + 1))
        seen = token[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen = seen & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_high = tl.maximum(high_score, tl.max(scores, 1))
        shift = tl.where(new_high == float("-inf"), 0.0, new_high)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(high_score - shift)
        high_score = new_high
        if DEFERRED:
            total = total * decay[:, None] + weights
        else:
            total = total * decay + tl.sum(weights, 1)
        if V_BITS < 16:
            weights *= v_scale.to(tl.float32)[None, :]
        weights16 = round16(weights, DTYPE)
        if V_BITS < 16:
            if DEFERRED:
                weight_sum = weight_sum * decay[:, None] + weights16.to(tl.float32)
            else:
                weight_sum = weight_sum * decay + tl.sum(weights16.to(tl.float32), 1)
        v_row = page + V_OFFSET + slot * (HEAD * V_BITS // 8)
        v_low, v_high = load_halves(v_row, known, V_BITS, RAW, DTYPE, HEAD, HALF, True, PTX)
        out_low = dot16(weights16, v_low, out_low * decay[:, None])
        out_high = dot16(weights16, v_high, out_high * decay[:, None])
        k_scale, v_scale = next_k_scale, next_v_scale
    if DEFERRED:
        total = tl.sum(total, 1)
        weight_sum = tl.sum(weight_sum, 1)
    if V_BITS < 16:
        out_low -= V_ZERO * weight_sum[:, None]
        out_high -= V_ZERO * weight_sum[:, None]
    return out_low, out_high, high_score, total


@triton.jit
def add_sink(sinks, high_score, total, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The softmax sum with exp(sink) of the row's query head added. sinks: pointer to the KV head's first."""
    sink = tl.load(sinks + tl.arange(0, ROWS) % GROUP).to(tl.float32) * LOG2E
    return total + tl.exp2(tl.minimum(sink - high_score, 126.0))


@triton.jit
def store_rows(
    low,
    high,
    output,  # pointer to the first query token and head of the tile
    stride_token,
    stride_head,
    count,
    basis,
    factor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Rotate fp32 (ROWS, HALF) halves of the attention output back and store them in DTYPE."""
    if ROTATED:
        low, high = rotate_halves(round16(low, DTYPE), round16(high, DTYPE), basis, HEAD, HALF)
        low, high = low * factor, high * factor
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    mask = ((row // GROUP) < count)[:, None] & (column < HEAD // 2)[None, :]
    at = output + ((row // GROUP).to(tl.int64) * stride_token + (row % GROUP) * stride_head)[:, None] + column[None, :]
    tl.store(at, round16(low, DTYPE), mask=mask)
    tl.store(at + HEAD // 2, round16(high, DTYPE), mask=mask)
