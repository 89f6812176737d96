"""Decode attention with keys as rows and queries as columns: the second form of the split kernel.

    S^T = K · q^T        O^T += V^T · P^T

The other form (`rows.py`) has queries as rows, of which a product on the tensor cores takes 16: with 4 query heads
a KV head three quarters of its softmax are padding. Columns come in eights. The arithmetic is otherwise the same, and
`combine.py` takes the partial outputs of either form.

Queries are carried into the stored basis once, by `prepared.py`, and not by every split. Rounded queries, weights
and unpacked codes have 16 bits: of the model's type or, with `Tuning.half`, of fp16 also in bf16 models, for which
codes unpack in fewer instructions and weights keep three bits more. Which form a batch takes is a matter of `Tuning`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.gpu.kernels.parts import dot16, round16
from fraqtl_kernels.gpu.kernels.prepared import load_prepared
from fraqtl_kernels.gpu.kernels.residual import residual_slots, residual_tokens_before
from fraqtl_kernels.gpu.kernels.softmax import cap_scores
from fraqtl_kernels.gpu.kernels.splits import count_pieces, oldest_visible, piece_start
from fraqtl_kernels.gpu.kernels.tiles import load_blocks, load_codes, load_scales, load_tile_scales

SUM_ROWS = tl.constexpr(16)  # the least that a product takes


@triton.jit
def score_columns(k_parts, k_scale, q_parts, q_zero, K: tl.constexpr, HAS_SHIFT: tl.constexpr, COLUMNS: tl.constexpr):
    """(keys, COLUMNS) products of codes with queries, dequantized."""
    KEY_PARTS: tl.constexpr = K.PARTS
    KEYS: tl.constexpr = k_scale.shape[0]
    scores = tl.zeros([KEYS, COLUMNS], tl.float32)
    if K.BITS < 16:
        scores -= q_zero[None, :]
    for part in tl.static_range(KEY_PARTS):
        scores = dot16(k_parts[part], q_parts[part], scores)
    if K.GROUPS > 0:
        scores *= (tl.abs(k_scale) if HAS_SHIFT else k_scale).to(tl.float32)[:, None]
    return scores


@triton.jit
def finish_columns(scores, k_scale, q_constant, q_shift, soft_cap, HAS_CENTER: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """As `rows.finish_scores`."""
    if HAS_CENTER:
        scores += q_constant[None, :]
    if HAS_SHIFT:
        is_outlier = tl.where(k_scale.to(tl.int16, bitcast=True) < 0, 1.0, 0.0)
        scores += is_outlier[:, None] * q_shift[None, :]
    if soft_cap is not None:
        scores = cap_scores(scores, soft_cap)
    return scores


@triton.jit
def add_value_columns(weights, v_parts, v_scales, alpha, out, sums, V: tl.constexpr, DTYPE: tl.constexpr):
    """(out, sums) · alpha plus those of a tile: weights (keys, COLUMNS), v_parts (WIDTH, keys), v_scales (keys,) each.

    out: parts (WIDTH, COLUMNS). sums: of the rounded weights, by group of scales, (SUM_ROWS, COLUMNS) each with equal
    rows: a product with ones takes fewer instructions than adding.
    """
    PARTS: tl.constexpr = V.PARTS
    KEYS: tl.constexpr = weights.shape[0]
    HAS_ZERO: tl.constexpr = V.ZEROS[0] != 0
    ones = round16(tl.full([SUM_ROWS, KEYS], 1.0, tl.float32), DTYPE)
    new_out = ()
    new_sums = ()
    scaled = round16(weights if V.GROUPS == 0 else weights * v_scales[0].to(tl.float32)[:, None], DTYPE)
    for part in tl.static_range(PARTS):
        if part < V.GROUPS and part > 0:
            scaled = round16(weights * v_scales[part].to(tl.float32)[:, None], DTYPE)
        if HAS_ZERO and (part < V.GROUPS or part == 0):
            new_sums = new_sums + (dot16(ones, scaled, sums[part] * alpha[None, :]),)
        new_out = new_out + (dot16(v_parts[part], scaled, out[part] * alpha[None, :]),)
    return new_out, new_sums


@triton.jit
def empty_output(V: tl.constexpr, SHAPE: tl.constexpr):
    """The zeros that `add_value_columns` begins with."""
    PARTS: tl.constexpr = V.PARTS
    WIDTH: tl.constexpr = V.WIDTH
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    HAS_ZERO: tl.constexpr = V.ZEROS[0] != 0
    out = ()
    sums = ()
    for part in tl.static_range(PARTS):
        out = out + (tl.zeros([WIDTH, COLUMNS], tl.float32),)
        if HAS_ZERO and (part < V.GROUPS or part == 0):
            sums = sums + (tl.zeros([SUM_ROWS, COLUMNS], tl.float32),)
    return out, sums


@triton.jit
def attend_residual_columns(
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
    """As `rows.attend_residual_tokens`: (parts of the output, maximum, sum, sums of rounded weights)."""
    DTYPE: tl.constexpr = q_parts[0].dtype
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    page = pool_head + tl.load(table_row + position // PAGE.BLOCK_SIZE).to(tl.int64) * stride_block
    index, before, known, slot, has_residual, residual_slot = residual_slots(position, PAGE.BLOCK_SIZE)
    k_scale = load_scales(page, slot, known, K)[0]
    k_parts = load_codes(page + K.CODES + slot * K.ROW_BYTES, known, DTYPE, K, False, PAGE.PTX)
    scores = score_columns(k_parts, k_scale, q_parts, q_zero, K, HAS_SHIFT, COLUMNS)
    if K.HAS_RESIDUAL:
        k_parts = load_codes(page + K.CODES + residual_slot * K.ROW_BYTES, has_residual, DTYPE, K, False, PAGE.PTX)
        residual_scale = load_scales(page, residual_slot, has_residual, K)[0]
        scores += score_columns(k_parts, residual_scale, q_parts, q_zero, K, False, COLUMNS)
    scores = finish_columns(scores, k_scale, q_constant, q_shift, soft_cap, HAS_CENTER, HAS_SHIFT)
    seen = known
    if window is not None:
        seen = seen & (before - index < window)
    scores = tl.where(seen[:, None], scores, float("-inf"))
    m_i = tl.max(scores, 0)
    weights = tl.exp2(scores - m_i[None, :])
    alpha = tl.full([COLUMNS], 1.0, tl.float32)
    out, sums = empty_output(V, SHAPE)
    v_parts = load_codes(page + V.CODES + slot * V.ROW_BYTES, known, DTYPE, V, True, PAGE.PTX, True)
    v_scales = load_scales(page, slot, known, V)
    out, sums = add_value_columns(weights, v_parts, v_scales, alpha, out, sums, V, DTYPE)
    if V.HAS_RESIDUAL:
        v_parts = load_codes(page + V.CODES + residual_slot * V.ROW_BYTES, has_residual, DTYPE, V, True, PAGE.PTX, True)
        v_scales = load_scales(page, residual_slot, has_residual, V)
        out, sums = add_value_columns(weights, v_parts, v_scales, alpha, out, sums, V, DTYPE)
    return out, m_i, tl.sum(weights, 0), sums


@triton.jit
def attend_columns(
    q_parts,  # (WIDTH, COLUMNS) each
    q_zero,
    q_constant,
    q_shift,
    position,  # (COLUMNS,) position of each column's query token
    first,  # these and what follows as for `rows.attend_tiles`
    last,
    oldest,
    length,
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
    """Attention of the columns over tokens [first, last): (parts of the output, maximum, sum), not normalized.

    Row sums are kept for every key of the tile and added up after the loop.
    """
    DTYPE: tl.constexpr = q_parts[0].dtype
    TILE: tl.constexpr = SHAPE.TILE
    COLUMNS: tl.constexpr = SHAPE.COLUMNS
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    PARTS: tl.constexpr = V.PARTS
    index = tl.arange(0, TILE)
    m_i = tl.full([COLUMNS], float("-inf"), tl.float32)
    l_i = tl.zeros([TILE, COLUMNS], tl.float32)
    out, sums = empty_output(V, SHAPE)
    if SHAPE.HAS_RESIDUAL and (K.HAS_RESIDUAL or V.HAS_RESIDUAL):
        if last == length:
            out, m_i, added, sums = attend_residual_columns(
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
            l_i = tl.where(index[:, None] == 0, added[None, :], 0.0)
        last = tl.minimum(last, length - 1 - residual_tokens_before(length - 1, PAGE.BLOCK_SIZE))
    # Loads ahead as in `rows.attend_tiles`
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
        scores = score_columns(k_parts, k_scale, q_parts, q_zero, K, HAS_SHIFT, COLUMNS)
        scores = finish_columns(scores, k_scale, q_constant, q_shift, soft_cap, HAS_CENTER, HAS_SHIFT)
        if SHAPE.QUERIES == 1:
            seen = known[:, None]  # the one query token sees what is there
        else:
            seen = token[:, None] <= position[None, :]
            if window is not None:
                seen = seen & (token[:, None] > position[None, :] - window)
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(scores - shift[None, :])
        alpha = tl.exp2(m_i - shift)
        m_i = m_new
        l_i = l_i * alpha[None, :] + weights
        v_parts = load_codes(page + V.CODES + slot * V.ROW_BYTES, known, DTYPE, V, True, PAGE.PTX, True)
        out, sums = add_value_columns(weights, v_parts, v_scales, alpha, out, sums, V, DTYPE)
        k_scale, v_scales = next_k_scale, next_v_scales
    finished = ()
    for part in tl.static_range(PARTS):
        if V.ZEROS[0] != 0:
            weight_sum = tl.max(sums[part if part < V.GROUPS else 0], 0)  # of equal rows
            finished = finished + (out[part] - V.ZEROS[0] * weight_sum[None, :],)
        else:
            finished = finished + (out[part],)
    return finished, m_i, tl.sum(l_i, 0)


# The arguments are those of `decode.attend_kernel`, less what `prepare_kernel` has done.
@triton.jit(
    do_not_specialize=["requests", "programs", "window"],
    do_not_specialize_on_alignment=["block_table", "query_start", "seq_lens"],
)
def attend_columns_kernel(
    prepared,
    terms,
    pool,
    pool_stride_block,
    pool_stride_head,
    block_table,
    table_stride,
    query_start,
    seq_lens,
    partial,
    lse,
    requests,
    programs,
    window,
    soft_cap,
    HAS_CENTER: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PAGE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    request, head, split_idx = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads, splits = tl.num_programs(1), tl.num_programs(2)
    length = tl.load(seq_lens + request).to(tl.int32)
    start = tl.load(query_start + request).to(tl.int32)
    count = tl.load(query_start + request + 1).to(tl.int32) - start
    if count <= 0:
        return
    TILE: tl.constexpr = SHAPE.TILE
    V: tl.constexpr = PAGE.V
    PARTS: tl.constexpr = V.PARTS
    oldest = oldest_visible(length, count, window)
    first = oldest // TILE * TILE
    pieces, own = count_pieces(
        first, length, seq_lens, query_start, requests, kv_heads, splits, programs, window, SHAPE
    )
    if split_idx >= pieces:
        return
    last = tl.minimum(first + piece_start(split_idx + 1, pieces, own) * TILE, length)
    first += piece_start(split_idx, pieces, own) * TILE
    query_slot = (request * kv_heads + head).to(tl.int64)
    q_parts, q_zero, q_constant, q_shift = load_prepared(prepared, terms, query_slot, PAGE, SHAPE)
    column = tl.arange(0, SHAPE.COLUMNS)
    position = length - count + tl.minimum(column // SHAPE.GROUP, count - 1)
    parts, m_i, l_i = attend_columns(
        q_parts,
        q_zero,
        q_constant,
        q_shift,
        position,
        first,
        last,
        oldest,
        length,
        block_table + request.to(tl.int64) * table_stride,
        pool + head.to(tl.int64) * pool_stride_head,
        pool_stride_block,
        window,
        soft_cap,
        HAS_CENTER,
        HAS_SHIFT,
        PAGE,
        SHAPE,
    )
    divisor = tl.where(l_i > 0, l_i, 1.0)  # columns that see nothing of the piece
    slot = (query_slot * splits + split_idx) * (SHAPE.GROUP * SHAPE.QUERIES) + column
    used = column < count * SHAPE.GROUP
    row = tl.arange(0, V.WIDTH)[:, None]
    for part in tl.static_range(PARTS):
        at = partial + slot[None, :] * PAGE.HEAD + part * V.COLUMNS + row
        tl.store(at, parts[part] / divisor[None, :], mask=used[None, :] & (row < V.COLUMNS))
    tl.store(lse + slot, m_i + tl.log2(l_i), mask=used)
