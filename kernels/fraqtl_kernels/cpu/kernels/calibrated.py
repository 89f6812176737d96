"""Codes of one calibrated vector on the CPU, compiled: `reference.quantize_with_feedback`.

The eight scales are tried in the eight lanes of a register, one coordinate after another, so nothing is added up across
lanes and one vector is encoded like many. What a trial needs of the feedback F is the product left · F.
`calibration.find_transform` makes F = H diag(f) H, with H of Sylvester's doubling where D is a power of two. Then
F[i, j] = g[i xor j], which rounding to 16 bits can't change, and the product is two rounds of sums and differences, the
first of them exact, and one multiplication a coordinate: D/2 · (2 log2(D/2) + 1) steps in place of D²/4. Any other F
is multiplied as it is.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fraqtl_kernels.cpu.kernels.codes import pack_codes
from fraqtl_kernels.cpu.kernels.lanes import (
    WIDTH,
    first_least,
    fma,
    lane,
    larger,
    largest,
    load,
    load_every,
    magnitude,
    rint,
    round_to_half,
    smaller,
    splat,
    splat_at,
    store,
    store_bytes,
    total,
)
from fraqtl_kernels.formats import FEEDBACK_GRID, FEEDBACK_LIMIT, SCALE_CHOICES

assert all(len(choices) == WIDTH for choices in SCALE_CHOICES.values())
_CHOICES_OF_3, _CHOICES_OF_4 = (tuple(np.float32(x) for x in SCALE_CHOICES[bits]) for bits in (3, 4))
_GRID, _FARTHEST = np.float32(FEEDBACK_GRID), np.float32(FEEDBACK_GRID * FEEDBACK_LIMIT)
_HIGHEST = np.float32(65504)


@njit(cache=True, nogil=True)
def extent(x, at, size):
    """(max|x|, whether no number is NaN or infinite) of x[at : at + size]."""
    most, broken = splat(np.float32(0)), splat(np.float32(0))
    nothing = splat(np.float32(0))
    for d in range(at, at + size, WIDTH):
        number = load(x, d)
        most = larger(magnitude(number), most)
        broken = fma(number, nothing, broken)
    whole = total(broken)
    return largest(most), whole == whole


@njit(cache=True, nogil=True)
def _two(a, b):
    return a + b, a - b


@njit(cache=True, nogil=True)
def _four(a, b, c, d):
    """Times the Hadamard matrix of order 4."""
    a, b = _two(a, b)
    c, d = _two(c, d)
    a, c = _two(a, c)
    b, d = _two(b, d)
    return a, b, c, d


@njit(cache=True, nogil=True)
def _eight(a, b, c, d, e, f, g, h):
    """Times that of order 8."""
    a, b, c, d = _four(a, b, c, d)
    e, f, g, h = _four(e, f, g, h)
    a, e = _two(a, e)
    b, f = _two(b, f)
    c, g = _two(c, g)
    d, h = _two(d, h)
    return a, b, c, d, e, f, g, h


@njit(cache=True, nogil=True)
def _store_eight(rows, start, a, b, c, d, e, f, g, h):
    store(rows, start, a)
    store(rows, start + 8, b)
    store(rows, start + 16, c)
    store(rows, start + 24, d)
    store(rows, start + 32, e)
    store(rows, start + 40, f)
    store(rows, start + 48, g)
    store(rows, start + 56, h)


@njit(cache=True, nogil=True)
def _four_at(left, start, at, row_stride):
    """Four rows, `row_stride` from each other, times that of order 4, in place."""
    i, step = start + at * WIDTH, row_stride * WIDTH
    j, k, m = i + step, i + 2 * step, i + 3 * step
    a, b, c, d = _four(load(left, i), load(left, j), load(left, k), load(left, m))
    store(left, i, a)
    store(left, j, b)
    store(left, k, c)
    store(left, m, d)


@njit(cache=True, nogil=True)
def _scaled_four_at(left, start, at, row_stride, spectrum, first):
    """The same twice, and the spectrum between."""
    i, step = start + at * WIDTH, row_stride * WIDTH
    j, k, m = i + step, i + 2 * step, i + 3 * step
    a, b, c, d = _four(load(left, i), load(left, j), load(left, k), load(left, m))
    a, b = a * splat_at(spectrum, first + at), b * splat_at(spectrum, first + at + row_stride)
    c, d = c * splat_at(spectrum, first + at + 2 * row_stride), d * splat_at(spectrum, first + at + 3 * row_stride)
    a, b, c, d = _four(a, b, c, d)
    store(left, i, a)
    store(left, j, b)
    store(left, k, c)
    store(left, m, d)


@njit(cache=True, nogil=True)
def _scaled_eight_at(left, start, at, row_stride, spectrum, first):
    """The same of eight rows and the matrix of order 8."""
    step, i = row_stride * WIDTH, start + at * WIDTH
    j = i + 4 * step
    a, b, c, d = load(left, i), load(left, i + step), load(left, i + 2 * step), load(left, i + 3 * step)
    e, f, g, h = load(left, j), load(left, j + step), load(left, j + 2 * step), load(left, j + 3 * step)
    a, b, c, d, e, f, g, h = _eight(a, b, c, d, e, f, g, h)
    k = first + at
    a, b = a * splat_at(spectrum, k), b * splat_at(spectrum, k + row_stride)
    c, d = c * splat_at(spectrum, k + 2 * row_stride), d * splat_at(spectrum, k + 3 * row_stride)
    e, f = e * splat_at(spectrum, k + 4 * row_stride), f * splat_at(spectrum, k + 5 * row_stride)
    g, h = g * splat_at(spectrum, k + 6 * row_stride), h * splat_at(spectrum, k + 7 * row_stride)
    a, b, c, d, e, f, g, h = _eight(a, b, c, d, e, f, g, h)
    store(left, i, a)
    store(left, i + step, b)
    store(left, i + 2 * step, c)
    store(left, i + 3 * step, d)
    store(left, j, e)
    store(left, j + step, f)
    store(left, j + 2 * step, g)
    store(left, j + 3 * step, h)


@njit(cache=True, nogil=True)
def _feed_back(left, start, width, spectrum, first):
    """What is left of the product with F / FEEDBACK_GRID between `_eight` at the begin and `_eight` at the end.

    width: 32, 64, 128 or 256.
    """
    if width == 32:
        for at in range(8):
            _scaled_four_at(left, start, at, 8, spectrum, first)
        return
    if width == 64:
        for at in range(8):
            _scaled_eight_at(left, start, at, 8, spectrum, first)
        return
    for block in range(0, width, 32):
        for at in range(8):
            _four_at(left, start, block + at, 8)
    for at in range(32):
        if width == 128:
            _scaled_four_at(left, start, at, 32, spectrum, first)
        else:
            _scaled_eight_at(left, start, at, 32, spectrum, first)
    for block in range(0, width, 32):
        for at in range(8):
            _four_at(left, start, block + at, 8)


@njit(cache=True, nogil=True)
def _feed_back_by(left, start, width, matrix, first, fed):
    """fed <- left · F / FEEDBACK_GRID in every lane, F of any form: (D/2, D/2) from matrix[first]. width: of 8s."""
    for column in range(0, width, 8):
        nothing = splat(np.float32(0))
        a, b, c, d, e, f, g, h = nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing
        at = first + column
        for row in range(width):
            number = load(left, start + row * WIDTH)
            a = fma(number, splat_at(matrix, at), a)
            b = fma(number, splat_at(matrix, at + 1), b)
            c = fma(number, splat_at(matrix, at + 2), c)
            d = fma(number, splat_at(matrix, at + 3), d)
            e = fma(number, splat_at(matrix, at + 4), e)
            f = fma(number, splat_at(matrix, at + 5), f)
            g = fma(number, splat_at(matrix, at + 6), g)
            h = fma(number, splat_at(matrix, at + 7), h)
            at += width
        _store_eight(left, fed + column * WIDTH, a, b, c, d, e, f, g, h)


@njit(cache=True, nogil=True)
def _nearest(steps, grid):
    """The nearest codes; zero for NaN. grid: midpoint and largest code in every lane."""
    return smaller(larger(rint(steps), splat(np.float32(0))), grid[1])


@njit(cache=True, nogil=True)
def _high(x, inverse, grid, is_tame):
    """What the nearest codes leave of x, on its grid and in units of it. is_tame: it is not farther than it may be."""
    steps = fma(x, inverse, grid[0])
    rest = rint((steps - _nearest(steps, grid)) * splat(_GRID))
    return rest if is_tame else smaller(larger(rest, splat(-_FARTHEST)), splat(_FARTHEST))


@njit(cache=True, nogil=True)
def _round_high(z, at, width, inverse, grid, left, start, is_tame, transformed):
    """left <- `_high` of z[at : at + width], times the Hadamard matrix of order 8 if `transformed`; sum of squares."""
    even, odd = splat(np.float32(0)), splat(np.float32(0))  # neither waits for the other
    for first in range(0, width, 8):
        i = at + first
        a, b = _high(splat_at(z, i), inverse, grid, is_tame), _high(splat_at(z, i + 1), inverse, grid, is_tame)
        even, odd = fma(a, a, even), fma(b, b, odd)
        c, d = _high(splat_at(z, i + 2), inverse, grid, is_tame), _high(splat_at(z, i + 3), inverse, grid, is_tame)
        even, odd = fma(c, c, even), fma(d, d, odd)
        e, f = _high(splat_at(z, i + 4), inverse, grid, is_tame), _high(splat_at(z, i + 5), inverse, grid, is_tame)
        even, odd = fma(e, e, even), fma(f, f, odd)
        g, h = _high(splat_at(z, i + 6), inverse, grid, is_tame), _high(splat_at(z, i + 7), inverse, grid, is_tame)
        even, odd = fma(g, g, even), fma(h, h, odd)
        if transformed:
            a, b, c, d, e, f, g, h = _eight(a, b, c, d, e, f, g, h)
        _store_eight(left, start + first * WIDTH, a, b, c, d, e, f, g, h)
    return even + odd


@njit(cache=True, nogil=True)
def _low(x, inverse, grid, fed):
    """What the nearest codes leave of x with `fed` added."""
    steps = fma(x, inverse, grid[0]) + fed
    return steps - _nearest(steps, grid)


@njit(cache=True, nogil=True)
def _round_low(z, at, width, inverse, grid, rows, fed, transformed):
    """The sum of squares of `_low` of z[at : at + width]; `fed` is multiplied as in `_round_high` before."""
    even, odd = splat(np.float32(0)), splat(np.float32(0))
    for first in range(0, width, 8):
        i, start = at + first, fed + first * WIDTH
        a, b, c, d = load(rows, start), load(rows, start + 8), load(rows, start + 16), load(rows, start + 24)
        e, f, g, h = load(rows, start + 32), load(rows, start + 40), load(rows, start + 48), load(rows, start + 56)
        if transformed:
            a, b, c, d, e, f, g, h = _eight(a, b, c, d, e, f, g, h)
            _store_eight(rows, start, a, b, c, d, e, f, g, h)
        a, b = _low(splat_at(z, i), inverse, grid, a), _low(splat_at(z, i + 1), inverse, grid, b)
        even, odd = fma(a, a, even), fma(b, b, odd)
        c, d = _low(splat_at(z, i + 2), inverse, grid, c), _low(splat_at(z, i + 3), inverse, grid, d)
        even, odd = fma(c, c, even), fma(d, d, odd)
        e, f = _low(splat_at(z, i + 4), inverse, grid, e), _low(splat_at(z, i + 5), inverse, grid, f)
        even, odd = fma(e, e, even), fma(f, f, odd)
        g, h = _low(splat_at(z, i + 6), inverse, grid, g), _low(splat_at(z, i + 7), inverse, grid, h)
        even, odd = fma(g, g, even), fma(h, h, odd)
    return even + odd


@njit(cache=True, nogil=True)
def _try_scales(z, at, width, scale, inverse, grid, is_tame, feedback, first, structured, rows, left, fed):
    """The number of the scale that leaves the least of z[at : at + 2 · width].

    rows: from element `fed` on <- what the first half is rounded with; `left`: the same unless not `structured`.
    """
    error = _round_high(z, at + width, width, inverse, grid, rows, left, is_tame, structured)
    error = error * splat(np.float32(1) / (_GRID * _GRID))
    if structured:
        _feed_back(rows, left, width, feedback, first)
    else:
        _feed_back_by(rows, left, width, feedback, first, fed)
    error = error + _round_low(z, at, width, inverse, grid, rows, fed, structured)
    return first_least(error * scale * scale)


@njit(cache=True, nogil=True)
def _store_pair(low, high, bits, d, width, codes, raw, code_at):
    """Store the codes of dimensions d .. d + 7 of both halves: those of 4 bits in the pool, others in `codes`."""
    if bits == 4:
        store_bytes(raw, code_at + d, fma(high, splat(np.float32(16)), low))
    else:
        store_bytes(codes, d, low)
        store_bytes(codes, width + d, high)


@njit(cache=True, nogil=True)
def _store_codes(z, at, width, scale, inverse, grid, rows, fed, bits, codes, raw, code_at):
    """Store the codes with the scale that was chosen, and leave in z what they left of it."""
    midpoint = grid[0]
    for d in range(0, width, WIDTH):
        x, y = load(z, at + d), load(z, at + width + d)
        low = _nearest(fma(x, inverse, midpoint) + load_every(rows, fed + d * WIDTH, WIDTH), grid)
        high = _nearest(fma(y, inverse, midpoint), grid)
        _store_pair(low, high, bits, d, width, codes, raw, code_at)
        store(z, at + d, x - (low - midpoint) * scale)
        store(z, at + width + d, y - (high - midpoint) * scale)
    if bits != 4:
        pack_codes(codes, bits, raw[code_at : code_at + 2 * width * bits // 8])


@njit(cache=True, nogil=True)
def encode(z, count, size, bits, numbers, feedback, first, structured, spare, codes, raw, code_at, scales):
    """Store the codes of `count` vectors of z (rows of `size`, flat), and leave in their place what they left of them.

    numbers: edge, midpoint and largest code of the grid. feedback: from element `first`, of `spectrum_of` if
    `structured`, else F divided by FEEDBACK_GRID. spare: 3 · D/2 · WIDTH float32. codes: (D,) uint8, spare. raw: the
    pool's bytes. code_at: (count,) where they go. scales: (count,) float32 <- the scales, NaN where z holds NaN or
    infinity.
    """
    width = size // 2
    rows = width * WIDTH
    edge, midpoint, levels = numbers
    grid = splat(midpoint), splat(levels)
    choices, inverses = np.empty(count * WIDTH, np.float32), np.empty(count * WIDTH, np.float32)
    tame, best = np.empty(count, np.bool_), np.empty(count, np.int64)
    fractions = np.empty(WIDTH, np.float32)
    for n in range(WIDTH):
        fractions[n] = (_CHOICES_OF_3[n] if bits == 3 else _CHOICES_OF_4[n]) / edge
    # One loop a step, so that no vector waits for the end of a chain of another
    for t in range(count):
        most, is_whole = extent(z, t * size, size)
        scales[t] = np.float32(0) if is_whole else np.float32(np.nan)
        rounded = round_to_half(smaller(splat(most) * load(fractions, 0), splat(_HIGHEST)))
        store(choices, t * WIDTH, rounded)
        store(inverses, t * WIDTH, splat(np.float32(1)) / rounded)
        # A scale that is neither rounded like a subnormal nor clamped leaves less than two steps of the largest number
        tame[t] = is_whole and lane(rounded, 0) >= np.float32(2.0**-14) and lane(rounded, WIDTH - 1) < _HIGHEST
    for t in range(count + 1):
        if t < count:
            fed = t % 2 * rows
            left = fed if structured else 2 * rows
            scale, inverse = load(choices, t * WIDTH), load(inverses, t * WIDTH)
            best[t] = t * WIDTH + _try_scales(
                z, t * size, width, scale, inverse, grid, tame[t], feedback, first, structured, spare, left, fed
            )
        if t > 0:
            n, chosen = t - 1, best[t - 1]
            scale, inverse = splat_at(choices, chosen), splat_at(inverses, chosen)
            fed = n % 2 * rows + chosen - n * WIDTH
            _store_codes(z, n * size, width, scale, inverse, grid, spare, fed, bits, codes, raw, code_at[n])
            scales[n] += choices[chosen]


@njit(cache=True, nogil=True)
def scale_of(most, edge):
    """The scale, an fp16 number, of a vector whose largest magnitude that is, without a search."""
    return lane(round_to_half(splat(min(most / edge, _HIGHEST))), 0)


@njit(cache=True, nogil=True)
def encode_residual(z, at, size, bits, numbers, codes, raw, code_at, residual, residual_at):
    """Code what `encode` left at z[at : at + size] like an ordinary vector. Returns its scale.

    The codes go to raw[code_at], unless that is negative, and what they stand for to residual[residual_at], likewise.
    """
    width = size // 2
    edge, midpoint_number, levels = numbers
    grid = splat(midpoint_number), splat(levels)
    most, is_whole = extent(z, at, size)
    scale = scale_of(most, edge)
    inverse = splat(np.float32(1)) / splat(scale)
    if not is_whole:
        scale = np.float32(np.nan)
    step, midpoint = splat(scale), grid[0]
    for d in range(0, width, WIDTH):
        low = _nearest(fma(load(z, at + d), inverse, midpoint), grid)
        high = _nearest(fma(load(z, at + width + d), inverse, midpoint), grid)
        if code_at >= 0:
            _store_pair(low, high, bits, d, width, codes, raw, code_at)
        if residual_at >= 0:
            store(residual, residual_at + d, (low - midpoint) * step)
            store(residual, residual_at + width + d, (high - midpoint) * step)
    if code_at >= 0 and bits != 4:
        pack_codes(codes, bits, raw[code_at : code_at + size * bits // 8])
    return scale
