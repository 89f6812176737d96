"""The inner loop of decode and prefill: online-softmax attention of some query rows over tiles of pages.

With stored codes c, scale s and zero point z (midpoint plus unpack bias, see `unpack.py`):

    score_j = k_scale_j · (q·c_j - z_k · sum(q)) [+ q·center_j]       key scale on the scores
    out     = Σ_j (p_j v_scale_j) · c_j - z_v · Σ_j p_j v_scale_j      value scale on the weights

so no element of the cache is ever multiplied. Queries arrive scaled by softmax scale · log2(e), see `softmax.py`.
Static key scales are part of q, static value scales are applied to the finished output.

The center of a key is left out where all keys share it and softmax doesn't see it. Keys with the sign bit in their
scale have the outlier center: their scores get q·(outlier center - center), `q_shift`.

Queries are rows here (`queries.py`). The other form, with queries as columns, is `transposed.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.parts import dot16, round16
from fraqtl_kernels.gpu.kernels.residual import residual_slots, residual_tokens_before
from fraqtl_kernels.gpu.kernels.softmax import add_weights, cap_scores, in_first_column
from fraqtl_kernels.gpu.kernels.tiles import load_blocks, load_codes, load_scales, load_tile_scales


@triton.jit
def finish_scores(scores, k_scale, q_constant, q_shift, soft_cap, HAS_CENTER: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """Products with dequantized keys as scores in units of log2: centers added, capped."""
    if HAS_CENTER:
        scores += q_constant[:, None]
    if HAS_SHIFT:
        is_outlier = tl.where(k_scale.to(tl.int16, bitcast=True) < 0, 1.0, 0.0)
        scores += is_outlier[None, :] * q_shift[:, None]
    if soft_cap is not None:
        scores = cap_scores(scores, soft_cap)
    return scores


@triton.jit
def score_codes(q_parts, q_zero, k_parts, k_scale, K: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """(ROWS, keys) products of queries with codes, dequantized."""
    KEY_PARTS: tl.constexpr = K.PARTS
    scores = tl.zeros([q_parts[0].shape[0], k_scale.shape[0]], tl.float32)
    for part in tl.static_range(KEY_PARTS):
        scores = dot16(q_parts[part], tl.trans(k_parts[part]), scores)
    if K.BITS < 16:
        scores -= q_zero[:, None]
    if K.GROUPS > 0:
        scores *= (tl.abs(k_scale) if HAS_SHIFT else k_scale).to(tl.float32)[None, :]
    return scores


@triton.jit
def weigh(weights, scales, V: tl.constexpr, DTYPE: tl.constexpr):
    """Rounded weights times the scales of each group of values; one of weights alone if they have no scales."""
    GROUPS: tl.constexpr = V.GROUPS
    scaled = ()
    for group in tl.static_range(GROUPS):
        scaled = scaled + (round16(weights * scales[group].to(tl.float32)[None, :], DTYPE),)
    if GROUPS == 0:
        scaled = (round16(weights, DTYPE),)
    return scaled


@triton.jit
def add_values(weights, page, slot, known, out, sums, V: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """out and sums plus those of the values in some slots of a page, as the loop of `attend_tiles` adds a tile's."""
    PARTS: tl.constexpr = V.PARTS
    values = load_codes(page + V.CODES + slot * V.ROW_BYTES, known, DTYPE, V, True, PTX)
    scaled = weigh(weights, load_scales(page, slot, known, V), V, DTYPE)
    new_out = ()
    new_sums = ()
    for part in tl.static_range(PARTS):
        weights16 = scaled[part if part < V.GROUPS else 0]
        if part < V.GROUPS or part == 0:
            new_sums = new_sums + (sums[part] + tl.sum(weights16.to(tl.float32), 1),)
        new_out = new_out + (dot16(weights16, values[part], out[part]),)
    return new_out, new_sums


@triton.jit
def attend_residual_tokens(
    q_parts,
    q_zero,
    q_constant,
    q_shift,
    position,  # of the one query token
    table_row,
    pool_head,
    stride_block,
    window,
    soft_cap,
    HAS_CENTER: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PAGE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Attention over the newest tokens of the query's block, with their residuals where they have some: what
    `attend_tiles` starts from.

    Returns parts of the output (ROWS, WIDTH), maximum and sum (ROWS,), and the sums of rounded weights.
    """
    DTYPE: tl.constexpr = q_parts[0].dtype
    ROWS: tl.constexpr = SHAPE.ROWS
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    PARTS: tl.constexpr = V.PARTS
    WIDTH: tl.constexpr = V.WIDTH
    page = pool_head + tl.load(table_row + position // PAGE.BLOCK_SIZE).to(tl.int64) * stride_block
    index, before, known, slot, has_residual, residual_slot = residual_slots(position, PAGE.BLOCK_SIZE)
    k_scale = load_scales(page, slot, known, K)[0]
    k_parts = load_codes(page + K.CODES + slot * K.ROW_BYTES, known, DTYPE, K, False, PAGE.PTX)
    scores = score_codes(q_parts, q_zero, k_parts, k_scale, K, HAS_SHIFT)
    if K.HAS_RESIDUAL:
        k_parts = load_codes(page + K.CODES + residual_slot * K.ROW_BYTES, has_residual, DTYPE, K, False, PAGE.PTX)
        residual_scale = load_scales(page, residual_slot, has_residual, K)[0]
        scores += score_codes(q_parts, q_zero, k_parts, residual_scale, K, False)
    scores = finish_scores(scores, k_scale, q_constant, q_shift, soft_cap, HAS_CENTER, HAS_SHIFT)
    seen = known
    if window is not None:
        seen = seen & (before - index < window)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    m_i = tl.max(scores, 1)
    weights = tl.exp2(scores - m_i[:, None])
    out = ()
    sums = ()
    for part in tl.static_range(PARTS):
        out = out + (tl.zeros([ROWS, WIDTH], tl.float32),)
        if part < V.GROUPS or part == 0:
            sums = sums + (tl.zeros([ROWS], tl.float32),)
    out, sums = add_values(weights, page, slot, known, out, sums, V, DTYPE, PAGE.PTX)
    if V.HAS_RESIDUAL:
        out, sums = add_values(weights, page, residual_slot, has_residual, out, sums, V, DTYPE, PAGE.PTX)
    return out, m_i, tl.sum(weights, 1), sums


@triton.jit
def attend_tiles(
    q_parts,
    q_zero,
    q_constant,
    q_shift,
    position,  # (ROWS,) position of each row's query token
    first,  # first token, a multiple of TILE
    last,  # one past the last token
    oldest,  # tokens before it are seen by no row, and their blocks may be freed
    length,  # of the request
    table_row,  # block numbers of the request
    pool_head,  # pointer to the page of block 0 and this KV head
    stride_block,
    window,
    soft_cap,
    HAS_CENTER: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PAGE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Attention of the rows over tokens [first, last): (parts of the output, maximum, sum), not normalized.

    Where the newest tokens are read with their residuals, the program that has the last token takes them first
    (`attend_residual_tokens`). The maximum is in units of log2. With DEFERRED, row sums are kept per column of the tile
    and added up after the loop: no reduction across threads inside it, for registers.
    """
    DTYPE: tl.constexpr = q_parts[0].dtype
    ROWS: tl.constexpr = SHAPE.ROWS
    TILE: tl.constexpr = SHAPE.TILE
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    PARTS: tl.constexpr = V.PARTS
    WIDTH: tl.constexpr = V.WIDTH
    HAS_ZERO: tl.constexpr = V.ZEROS[0] != 0
    index = tl.arange(0, TILE)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS, TILE] if SHAPE.DEFERRED else [ROWS], tl.float32)
    weight_sums = ()
    out = ()
    for part in tl.static_range(PARTS):
        out = out + (tl.zeros([ROWS, WIDTH], tl.float32),)
        if part < V.GROUPS or part == 0:
            weight_sums = weight_sums + (l_i,)
    bound = position + 1  # every row sees what is before it
    if SHAPE.HAS_RESIDUAL and (K.HAS_RESIDUAL or V.HAS_RESIDUAL):
        bound = length - 1 - residual_tokens_before(length - 1, PAGE.BLOCK_SIZE)
        if last == length:
            out, m_i, added, sums = attend_residual_tokens(
                q_parts,
                q_zero,
                q_constant,
                q_shift,
                length - 1,
                table_row,
                pool_head,
                stride_block,
                window,
                soft_cap,
                HAS_CENTER,
                HAS_SHIFT,
                PAGE,
                SHAPE,
            )
            l_i = in_first_column(added, SHAPE)
            weight_sums = ()
            for part in tl.static_range(PARTS):
                if part < V.GROUPS or part == 0:
                    weight_sums = weight_sums + (in_first_column(sums[part], SHAPE),)
        last = tl.minimum(last, bound)
        bound += tl.zeros([ROWS], tl.int32)
    # Triton pipelines the codes and their block numbers (STAGES apart over two levels of loads), but no loads of
    # 2 bytes: the scales of a tile are loaded one tile ahead by hand, from block numbers loaded two tiles ahead.
    block = load_blocks(table_row, first, last, PAGE, TILE)
    next_block = load_blocks(table_row, first + TILE, last, PAGE, TILE)
    k_scale, v_scales = load_tile_scales(pool_head, block, stride_block, first, last, oldest, PAGE, TILE)
    for start in tl.range(first, last, TILE, num_stages=SHAPE.STAGES):
        token = start + index
        known = (token < last) & (token >= oldest)
        next_k_scale, next_v_scales = load_tile_scales(
            pool_head, next_block, stride_block, start + TILE, last, oldest, PAGE, TILE
        )
        next_block = load_blocks(table_row, start + 2 * TILE, last, PAGE, TILE)
        block = load_blocks(table_row, start, last, PAGE, TILE)
        page = pool_head + block.to(tl.int64) * stride_block
        slot = start % PAGE.BLOCK_SIZE + index if PAGE.BLOCK_SIZE % TILE == 0 else token % PAGE.BLOCK_SIZE
        k_parts = load_codes(page + K.CODES + slot * K.ROW_BYTES, known, DTYPE, K, False, PAGE.PTX)
        scores = score_codes(q_parts, q_zero, k_parts, k_scale, K, HAS_SHIFT)
        scores = finish_scores(scores, k_scale, q_constant, q_shift, soft_cap, HAS_CENTER, HAS_SHIFT)
        seen = token[None, :] < bound[:, None]
        if window is not None:
            seen = seen & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(scores - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        m_i = m_new
        l_i = add_weights(l_i, alpha, weights, SHAPE)
        v_parts = load_codes(page + V.CODES + slot * V.ROW_BYTES, known, DTYPE, V, True, PAGE.PTX)
        scaled = weigh(weights, v_scales, V, DTYPE)
        new_sums = ()
        new_out = ()
        for part in tl.static_range(PARTS):
            weights16 = scaled[part if part < V.GROUPS else 0]
            if HAS_ZERO and (part < V.GROUPS or part == 0):
                new_sums = new_sums + (add_weights(weight_sums[part], alpha, weights16.to(tl.float32), SHAPE),)
            new_out = new_out + (dot16(weights16, v_parts[part], out[part] * alpha[:, None]),)
        out = new_out
        if HAS_ZERO:
            weight_sums = new_sums
        k_scale, v_scales = next_k_scale, next_v_scales
    if SHAPE.DEFERRED:
        l_i = tl.sum(l_i, 1)
    finished = ()
    for part in tl.static_range(PARTS):
        if HAS_ZERO:
            weight_sum = weight_sums[part if part < V.GROUPS else 0]
            if SHAPE.DEFERRED:
                weight_sum = tl.sum(weight_sum, 1)
            finished = finished + (out[part] - V.ZEROS[0] * weight_sum[:, None],)
        else:
            finished = finished + (out[part],)
    return finished, m_i, l_i
