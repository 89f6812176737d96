"""The inner loop of decode and prefill: online-softmax attention of some query rows over tiles of pages.

With stored codes c, scale s and zero point z (midpoint plus unpack bias, see `unpack.py`):

    score_j = k_scale_j · (q·c_j - z_k · sum(q)) [+ q·center_j]       key scale on the scores
    out     = Σ_j (p_j v_scale_j) · c_j - z_v · Σ_j p_j v_scale_j      value scale on the weights

so no element of the cache is ever multiplied. Queries arrive scaled by softmax scale · log2(e):
weights are powers of two, exp2(score - running maximum) (Milakov & Gimelshein, arXiv 1805.02867).
Static key scales are part of q, static value scales are applied to the finished output.

The center of a key is left out where all keys share it and softmax doesn't see it. Keys with the sign bit in their
scale have the outlier center: their scores get q·(outlier center - center), `q_shift`.

Rows: row m is query token m // GROUP and query head m % GROUP of one KV head, so all query heads of
a KV head read the codes once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.tiles import (
    dot16,
    load_codes,
    load_parts,
    load_scales,
    part_columns,
    rotate_parts,
    round16,
    store_parts,
)
from fraqtl_kernels.residual import DISTANCE

LOG2E = tl.constexpr(1.4426950408889634)
_DISTANCE = tl.constexpr(DISTANCE)
_RESIDUAL_TILE = tl.constexpr(16)  # keys of a tile that holds the newest tokens: the least that a product takes


@triton.jit
def query_rows(pointer, stride_token, stride_head, count, SHAPE: tl.constexpr):
    """(ROWS, 1) pointers to the rows of a tile of query tokens, and which of them there are. pointer: to the first."""
    ROWS: tl.constexpr = SHAPE.ROWS
    row = tl.arange(0, ROWS)[:, None]
    at = pointer + (row // SHAPE.GROUP).to(tl.int64) * stride_token + (row % SHAPE.GROUP) * stride_head
    return at, row // SHAPE.GROUP < count


@triton.jit
def dot_vector(parts, vector, VECTOR: tl.constexpr):
    """(rows,) products of fp32 parts with a vector (D,) in memory; None: zeros."""
    total = tl.zeros([parts[0].shape[0]], tl.float32)
    if vector is not None:
        column, real = part_columns(VECTOR)
        PARTS: tl.constexpr = VECTOR.PARTS
        for part in tl.static_range(PARTS):
            piece = tl.load(vector + part * VECTOR.COLUMNS + column, mask=real, other=0.0)
            total += tl.sum(parts[part] * piece, 1)
    return total


@triton.jit
def load_query(
    rows,  # of `query_rows`
    used,
    head,
    basis,
    basis_stride_head,
    key_scale,
    center,
    outlier_shift,
    scale,
    factor,
    VECTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Parts of the rotated, scaled query in DTYPE; z_k · sum(q), q·center and q·shift of every row in fp32.

    scale: softmax scale (and log2(e) without soft-cap). The rest as for `decode.attend_kernel`.
    """
    PARTS: tl.constexpr = VECTOR.PARTS
    raw = load_parts(rows, used, VECTOR)
    if VECTOR.ROTATED:
        parts = rotate_parts(raw, basis + head * basis_stride_head, factor * scale, VECTOR)
    else:
        parts = ()
        for part in tl.static_range(PARTS):
            parts = parts + (raw[part].to(tl.float32) * scale,)
    vector = head * (PARTS * VECTOR.COLUMNS)
    if VECTOR.STATIC:
        column, real = part_columns(VECTOR)
        scaled = ()
        for part in tl.static_range(PARTS):
            at = key_scale + vector + part * VECTOR.COLUMNS + column
            scaled = scaled + (parts[part] * tl.load(at, mask=real, other=0.0),)
        parts = scaled
    constant = dot_vector(parts, None if center is None else center + vector, VECTOR)
    shift = dot_vector(parts, None if outlier_shift is None else outlier_shift + vector, VECTOR)
    rounded = ()
    zero = tl.zeros([parts[0].shape[0]], tl.float32)
    for part in tl.static_range(PARTS):
        rounded = rounded + (round16(parts[part], DTYPE),)
        # Of the rounded query, so that the bias cancels exactly
        zero += tl.sum(rounded[part].to(tl.float32), 1) * VECTOR.ZEROS[part]
    return rounded, zero, constant, shift


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


@triton.jit
def cap_scores(scores, soft_cap):
    """cap · tanh(s / cap) in units of log2, with tanh(x) = 1 - 2 / (exp(2x) + 1)."""
    return soft_cap * LOG2E * (1 - 2 / (tl.exp2(scores * (2 * LOG2E / soft_cap)) + 1))


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
def residual_tokens_before(position, BLOCK_SIZE: tl.constexpr):
    """How many tokens before the one at `position` stand among the DISTANCE newest of its block."""
    return tl.minimum(_DISTANCE - 1, position % BLOCK_SIZE)


@triton.jit
def residual_slots(position, BLOCK_SIZE: tl.constexpr):
    """Of a tile that holds the newest tokens of the block of `position`: (its numbers, those tokens but one, which
    numbers are tokens, their slots, which have a residual, the slots of those)."""
    index = tl.arange(0, _RESIDUAL_TILE)
    before = residual_tokens_before(position, BLOCK_SIZE)
    known = index <= before
    slot = tl.where(known, position % BLOCK_SIZE - before + index, 0)
    has_residual = known & (slot + _DISTANCE < BLOCK_SIZE)
    residual_slot = tl.where(has_residual, slot + _DISTANCE, 0)
    return index, before, known, slot, has_residual, residual_slot


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


@triton.jit
def in_first_column(x, SHAPE: tl.constexpr):
    """(ROWS,) sums as `add_weights` keeps them."""
    if SHAPE.DEFERRED:
        return tl.where(tl.arange(0, SHAPE.TILE)[None, :] == 0, x[:, None], 0.0)
    else:
        return x


@triton.jit
def add_weights(l_i, alpha, weights, SHAPE: tl.constexpr):
    """The running sum over tiles, decayed, with the weights of a tile added: a column of the tile each if DEFERRED."""
    if SHAPE.DEFERRED:
        return l_i * alpha[:, None] + weights
    else:
        return l_i * alpha + tl.sum(weights, 1)


@triton.jit
def add_sink_logits(sink_logits, head, m_i, l_i, SHAPE: tl.constexpr):
    """The softmax sum with exp(sink logit) of the row's query head added. sink_logits: (query heads,)."""
    ROWS: tl.constexpr = SHAPE.ROWS
    sink_logit = tl.load(sink_logits + head * SHAPE.GROUP + tl.arange(0, ROWS) % SHAPE.GROUP).to(tl.float32) * LOG2E
    return l_i + tl.exp2(tl.minimum(sink_logit - m_i, 126.0))


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
