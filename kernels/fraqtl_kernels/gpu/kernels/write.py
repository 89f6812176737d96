"""Store keys and values into packed pages: transform, center, quantize, encode residuals, pack and scatter in one
launch.

For every (token, KV head), with B the basis (a rotation, or what calibration chose) and c the center in it:

    y = x B - c,   scale = fp16(max|y| / 2^(bits-1)),   code = clamp(round(y / scale + midpoint), 0, 2^bits - 1)

a scale for each group of dimensions: the midpoint grid of `reference.quantize`, rounding half to even as it does.
Where calibration gives a feedback, vectors take the steps of `reference.quantize_with_feedback` from there. Keys
take the outlier center if their scale is smaller with it; the sign bit of the scale says so. Static formats divide by
their steps instead, see `reference.quantize_static`. Sums of products are
taken in fp32 over exact products, so codes equal the reference's except where y / scale lies within
fp32 rounding of the edge between two codes, or two scales are equally good. A vector that holds NaN or infinity gets a
NaN scale. Tokens of formats with residuals leave their residual in a free slot, see `residual.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fraqtl_kernels.formats import FEEDBACK_GRID, FEEDBACK_LIMIT, LARGEST_SCALE, SCALE_CHOICES
from fraqtl_kernels.gpu.kernels.parts import dot16, load_parts, part_columns, rotate_parts, round16, store_parts
from fraqtl_kernels.residual import DISTANCE

_DISTANCE = tl.constexpr(DISTANCE)
_LARGEST_SCALE = tl.constexpr(LARGEST_SCALE)
# Those of all bits are as many and as far from each other, see `formats.py`
_CHOICES = tl.constexpr(len(SCALE_CHOICES[4]))
_BETWEEN_CHOICES = tl.constexpr(SCALE_CHOICES[4][1] - SCALE_CHOICES[4][0])
_GRID = tl.constexpr(float(FEEDBACK_GRID))
_LIMIT = tl.constexpr(FEEDBACK_LIMIT)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds half to even


@triton.jit
def round_codes(steps, lowest: tl.constexpr, VECTOR: tl.constexpr):
    """Codes as int32: steps rounded half to even, within [lowest, 2^bits - 1]. NaN becomes the lowest."""
    highest: tl.constexpr = 2**VECTOR.BITS - 1
    steps = tl.where(steps == steps, steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, -1.0), highest + 1.0)
    codes = (steps + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(codes, lowest * 1.0), highest * 1.0).to(tl.int32)


@triton.jit
def subtract(parts, vector, VECTOR: tl.constexpr):
    """fp32 parts minus a vector (D,) in memory."""
    PARTS: tl.constexpr = VECTOR.PARTS
    column, real = part_columns(VECTOR)
    out = ()
    for part in tl.static_range(PARTS):
        piece = tl.load(vector + part * VECTOR.COLUMNS + column, mask=real, other=0.0)
        out = out + (parts[part] - piece,)
    return out


@triton.jit
def scales_of(parts, VECTOR: tl.constexpr):
    """(TOKENS,) fp16 scale of every group of a vector."""
    PARTS: tl.constexpr = VECTOR.PARTS
    scales = ()
    merged = tl.max(tl.abs(parts[0]), 1)
    for part in tl.static_range(PARTS):
        largest = tl.max(tl.abs(parts[part]), 1)
        merged = tl.maximum(merged, largest)
        scales = scales + (scale_of(largest, VECTOR),)
    if VECTOR.GROUPS == 1:
        scales = (scale_of(merged, VECTOR),)
    return scales


@triton.jit
def scale_of(largest, VECTOR: tl.constexpr):
    """The largest magnitude lies on the edge of the grid."""
    edge: tl.constexpr = 2 ** (VECTOR.BITS - 1)
    return tl.minimum(largest / edge, _LARGEST_SCALE).to(tl.float16)


@triton.jit
def is_negative(scale):
    """The sign bit of an fp16, that of -0.0 too."""
    return scale.to(tl.int16, bitcast=True) < 0


@triton.jit
def choose_center(parts, scales, outlier_parts, VECTOR: tl.constexpr):
    """(parts, scales) of the center that leaves less of each key; the scale's sign bit set where it is that of
    outliers."""
    PARTS: tl.constexpr = VECTOR.PARTS
    outlier_scale = scales_of(outlier_parts, VECTOR)[0]
    is_outlier = outlier_scale < scales[0]
    chosen = ()
    for part in tl.static_range(PARTS):
        chosen = chosen + (tl.where(is_outlier[:, None], outlier_parts[part], parts[part]),)
    return chosen, (tl.where(is_outlier, -outlier_scale, scales[0]),)


@triton.jit
def codes_with_feedback(parts, feedback, VECTOR: tl.constexpr):
    """((low, high) codes int32, scales fp16) by `reference.quantize_with_feedback`. feedback: (D/2, D/2) in memory."""
    edge: tl.constexpr = 2 ** (VECTOR.BITS - 1)
    low, high = parts[0], parts[1]
    column, real = part_columns(VECTOR)
    row = tl.arange(0, VECTOR.WIDTH)[:, None]
    matrix = tl.load(feedback + row * VECTOR.COLUMNS + column, mask=(row < VECTOR.COLUMNS) & real, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    best = tl.zeros(low.shape, tl.int32)  # both codes in one number, for the registers
    best_scale = tl.zeros(largest.shape, tl.float16)
    least = largest
    for number in tl.range(_CHOICES):
        choice = VECTOR.FIRST_CHOICE + number * _BETWEEN_CHOICES
        scale = tl.minimum(largest * (choice / edge), _LARGEST_SCALE).to(tl.float16)
        step = scale.to(tl.float32)
        steps = tl.div_rn(high, step[:, None]) + VECTOR.MIDPOINT
        high_codes = round_codes(steps, 0, VECTOR)
        left = tl.minimum(tl.maximum(steps - high_codes.to(tl.float32), -_LIMIT), _LIMIT) * _GRID
        left = tl.where(real, ((left + _ROUND) - _ROUND) / _GRID, 0.0)
        fed = dot16(round16(left, matrix.dtype), matrix, tl.zeros(low.shape, tl.float32))
        steps = tl.div_rn(low, step[:, None]) + fed + VECTOR.MIDPOINT
        low_codes = round_codes(steps, 0, VECTOR)
        low_left = tl.where(real, steps - low_codes.to(tl.float32), 0.0)
        error = (tl.sum(low_left * low_left, 1) + tl.sum(left * left, 1)) * step * step
        better = (error < least) | (number == 0)
        best = tl.where(better[:, None], low_codes | (high_codes << 4), best)
        best_scale = tl.where(better, scale, best_scale)
        least = tl.where(better, error, least)
    return (best & 15, best >> 4), best_scale


@triton.jit
def store_codes(row, codes, mask, VECTOR: tl.constexpr):
    """Pack int32 codes of the parts and store them. row: (TOKENS, 1) pointers; mask: (TOKENS, 1)."""
    PARTS: tl.constexpr = VECTOR.PARTS
    column, real = part_columns(VECTOR)
    if VECTOR.BITS == 3:
        store_triples(row, codes, mask, VECTOR)
    elif VECTOR.BITS == 8:
        for part in tl.static_range(PARTS):
            tl.store(row + part * VECTOR.COLUMNS + column, codes[part].to(tl.uint8), mask=mask & real)
    else:
        packed = codes[0]
        for part in tl.static_range(1, PARTS):
            packed = packed | (codes[part] << (part * VECTOR.BITS))
        tl.store(row + column, packed.to(tl.uint8), mask=mask & real)


@triton.jit
def store_triples(row, codes, mask, VECTOR: tl.constexpr):
    """The same of 3-bit codes, in halves. A byte holds codes of several columns: products with powers of two add them
    up, all of them whole numbers below 256."""
    WIDTH: tl.constexpr = VECTOR.WIDTH
    QUARTER: tl.constexpr = VECTOR.COLUMNS // 2
    source, target = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    real = source < VECTOR.COLUMNS
    # Of dimension `source` of a half in byte `target`: the lower two bits, and the third
    same, next_quarter = source == target, source == target + QUARTER
    pair_value = tl.where(real, tl.where(same, 1.0, tl.where(next_quarter, 4.0, 0.0)), 0.0).to(tl.float16)
    quarter, at = source // QUARTER, source % QUARTER  # third bits stand as `formats.TOP_BITS` says
    eighth: tl.constexpr = QUARTER // 2
    bit = tl.where(quarter == 0, 1.0, 4.0) * tl.where(at >= eighth, 16.0, 1.0)
    bit_value = tl.where(real & (at % eighth == target), bit, 0.0).to(tl.float16)
    lower = tl.zeros(codes[0].shape, tl.float32)
    upper = lower
    for half in tl.static_range(2):
        lower += (15 * half + 1) * dot16(
            (codes[half] & 3).to(tl.float16), pair_value, tl.zeros(lower.shape, tl.float32)
        )
        upper += (half + 1) * dot16((codes[half] >> 2).to(tl.float16), bit_value, tl.zeros(lower.shape, tl.float32))
    tl.store(row + target, lower.to(tl.int32).to(tl.uint8), mask=mask & (target < QUARTER))
    tl.store(row + QUARTER + target, upper.to(tl.int32).to(tl.uint8), mask=mask & (target < eighth))


@triton.jit
def store_quantized(page, slot, codes, scales, parts, mask, VECTOR: tl.constexpr):
    """Codes and scales of `parts`, which say whether a vector is broken. mask: (TOKENS, 1)."""
    PARTS: tl.constexpr = VECTOR.PARTS
    GROUPS: tl.constexpr = VECTOR.GROUPS
    store_codes((page + VECTOR.CODES + slot * VECTOR.ROW_BYTES)[:, None], codes, mask, VECTOR)
    for group in tl.static_range(GROUPS):
        # x · 0 is NaN for NaN and infinity: one sum finds both
        broken = tl.sum(parts[group] * 0.0, 1)
        if GROUPS == 1:
            for part in tl.static_range(1, PARTS):
                broken += tl.sum(parts[part] * 0.0, 1)
        stored = tl.where(broken == 0.0, scales[group], float("nan")).to(tl.float16)
        at = page + VECTOR.SCALES + slot * (2 * GROUPS) + 2 * group
        tl.store(at[:, None].to(tl.pointer_type(tl.float16)), stored[:, None], mask=mask)


@triton.jit
def plain_codes(parts, scales, VECTOR: tl.constexpr):
    """Int32 codes of the parts, each rounded to the nearest."""
    PARTS: tl.constexpr = VECTOR.PARTS
    codes = ()
    for part in tl.static_range(PARTS):
        scale = tl.abs(scales[part if part < VECTOR.GROUPS else 0]).to(tl.float32)
        steps = tl.div_rn(parts[part], scale[:, None]) + VECTOR.MIDPOINT
        codes = codes + (round_codes(steps, 0, VECTOR),)
    return codes


@triton.jit
def store_residuals(page, slot, codes, scales, parts, mask, VECTOR: tl.constexpr):
    """What codes and scales leave of the parts, coded like an ordinary vector. See `residual.py`."""
    PARTS: tl.constexpr = VECTOR.PARTS
    _, real = part_columns(VECTOR)
    left = ()
    for part in tl.static_range(PARTS):
        scale = tl.abs(scales[part if part < VECTOR.GROUPS else 0]).to(tl.float32)
        rest = parts[part] - (codes[part].to(tl.float32) - VECTOR.MIDPOINT) * scale[:, None]
        left = left + (tl.where(real, rest, 0.0),)
    residual_scales = scales_of(left, VECTOR)
    store_quantized(page, slot, plain_codes(left, residual_scales, VECTOR), residual_scales, left, mask, VECTOR)


@triton.jit
def store_vectors(
    source,  # (TOKENS, 1) pointers to vectors
    page,  # (TOKENS,) pointers to pages
    slot,  # (TOKENS,) places within them
    used,  # (TOKENS, 1)
    stores_residual,  # (TOKENS, 1) whether residuals go DISTANCE slots behind
    basis,  # this and what follows: pointers to the matrix or vector of the KV head, or None
    feedback,
    static_scale,
    center,
    outlier_center,
    factor,
    VECTOR: tl.constexpr,
):
    """Keys or values of one KV head."""
    PARTS: tl.constexpr = VECTOR.PARTS
    raw = load_parts(source, used, VECTOR)
    row = (page + VECTOR.CODES + slot * VECTOR.ROW_BYTES)[:, None]
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (raw[part].to(tl.float32),)
    codes = ()
    if VECTOR.BITS == 16:
        RAW: tl.constexpr = VECTOR.RAW
        store_parts(row.to(tl.pointer_type(RAW)), parts, used, RAW, VECTOR)
    elif VECTOR.STATIC:
        column, real = part_columns(VECTOR)
        for part in tl.static_range(PARTS):
            step = tl.load(static_scale + part * VECTOR.COLUMNS + column, mask=real, other=1.0)
            steps = tl.div_rn(parts[part], step) + VECTOR.MIDPOINT
            steps = tl.where(steps == steps, steps, VECTOR.MIDPOINT)
            codes = codes + (round_codes(steps, 1, VECTOR),)
        store_codes(row, codes, used, VECTOR)
    else:
        if VECTOR.ROTATED:
            parts = rotate_parts(raw, basis, factor, VECTOR)
        rotated = parts
        if center is not None:
            parts = subtract(rotated, center, VECTOR)
        scales = scales_of(parts, VECTOR)
        if outlier_center is not None:
            parts, scales = choose_center(parts, scales, subtract(rotated, outlier_center, VECTOR), VECTOR)
        if feedback is not None:
            codes, best_scale = codes_with_feedback(parts, feedback, VECTOR)
            scales = (
                best_scale if outlier_center is None else tl.where(is_negative(scales[0]), -best_scale, best_scale),
            )
        else:
            codes = plain_codes(parts, scales, VECTOR)
        store_quantized(page, slot, codes, scales, parts, used, VECTOR)
        if VECTOR.HAS_RESIDUAL:
            store_residuals(page, slot + _DISTANCE, codes, scales, parts, stores_residual, VECTOR)


@triton.jit(do_not_specialize=["tokens"])
def write_kernel(
    key,
    key_stride_token,
    key_stride_head,
    value,
    value_stride_token,
    value_stride_head,
    pool,
    pool_stride_block,
    pool_stride_head,
    slot_mapping,
    basis_key,  # these and what follows are fields of `StreamOperands`
    basis_key_stride_head,
    basis_value,
    basis_value_stride_head,
    feedback_key,
    feedback_value,
    key_scale,
    value_scale,
    key_center,
    key_outlier_center,
    value_center,
    tokens,
    key_factor,
    value_factor,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    K: tl.constexpr = PAGE.K
    V: tl.constexpr = PAGE.V
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place = tl.load(slot_mapping + token, mask=token < tokens, other=-1)
    used = place >= 0
    place = tl.where(used, place, 0)
    page = pool + head.to(tl.int64) * pool_stride_head + (place // PAGE.BLOCK_SIZE).to(tl.int64) * pool_stride_block
    slot = (place % PAGE.BLOCK_SIZE).to(tl.int32)
    # Unless a token of this batch goes there
    after = tl.load(slot_mapping + token + _DISTANCE, mask=token + _DISTANCE < tokens, other=-1)
    stores_residual = used & (slot + _DISTANCE < PAGE.BLOCK_SIZE) & (after != place + _DISTANCE)
    vector = head * PAGE.HEAD
    square = head * (PAGE.HEAD // 2) * (PAGE.HEAD // 2)
    if tl.program_id(2) == 0:
        store_vectors(
            (key + token.to(tl.int64) * key_stride_token + head * key_stride_head)[:, None],
            page,
            slot,
            used[:, None],
            stores_residual[:, None],
            None if basis_key is None else basis_key + head * basis_key_stride_head,
            None if feedback_key is None else feedback_key + square,
            None if key_scale is None else key_scale + vector,
            None if key_center is None else key_center + vector,
            None if key_outlier_center is None else key_outlier_center + vector,
            key_factor,
            K,
        )
    else:
        store_vectors(
            (value + token.to(tl.int64) * value_stride_token + head * value_stride_head)[:, None],
            page,
            slot,
            used[:, None],
            stores_residual[:, None],
            None if basis_value is None else basis_value + head * basis_value_stride_head,
            None if feedback_value is None else feedback_value + square,
            None if value_scale is None else value_scale + vector,
            None if value_center is None else value_center + vector,
            None,
            value_factor,
            V,
        )
