"""CPU prefill, compiled: many queries of one request over its pages, as blocked matrix products.

A tile of keys and values is dequantized into panels (see `products.py`) and all queries go over it, ROWS_TOGETHER rows
at a time: scores, an online softmax (Milakov & Gimelshein, arXiv 1805.02867), and the product with the values while
the scores are still in the first-level cache. A row is one query head of one token; those of a token stand together.

A query's result depends on its position and on what the pages hold, and not on which other queries come with it: keys
are joined in pieces that begin at fixed positions, and each number is one chain of multiply-adds over a piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fraqtl_kernels.cpu.kernels.codes import load_codes, scale_groups
from fraqtl_kernels.cpu.kernels.lanes import (
    WIDTH,
    exp,
    first_of,
    fma,
    larger,
    largest,
    load,
    load_every,
    splat,
    store,
    total,
)
from fraqtl_kernels.cpu.kernels.products import PANEL, ROWS, add_six, multiply, multiply_six
from fraqtl_kernels.cpu.kernels.softmax import share_of_keys
from fraqtl_kernels.cpu.kernels.tensors import prepare_query, row_at
from fraqtl_kernels.cpu.layers.bits import from_float, to_float

ROWS_TOGETHER = 2 * ROWS
SLACK = WIDTH  # numbers behind a row of scores that may be read and overwritten


class Carried(NamedTuple):
    """Rows of queries, and their online softmax from tile to tile.

    q, acc: (heads · blocks · rows, D) float32. score_bias, m_i, l_i: (heads · blocks · rows,).
    """

    q: Any
    score_bias: Any
    m_i: Any
    l_i: Any
    acc: Any

    @classmethod
    def of(cls, rows: int, size: int) -> Carried:
        """Before the first tile."""
        bias, total = (np.zeros(rows, np.float32) for _ in range(2))
        q, acc = (np.zeros((rows, size), np.float32) for _ in range(2))
        return cls(q, bias, np.full(rows, -np.inf, np.float32), total, acc)


@njit(cache=True, nogil=True)
def _block_of(part, heads, blocks):
    """(head, block) of a part. Blocks from both ends by turns: so every run of parts has its share of the long ones."""
    step, head = part // heads, part % heads
    return head, (step // 2 if step % 2 == 0 else blocks - 1 - step // 2)


@njit(cache=True, nogil=True)
def begin(first, after, source, like, batch, reading, q, score_bias):
    """Queries of parts first .. after - 1 into the basis of the stored keys.

    source: address of the request's first query, numbers from token to token. batch: `prefill._Batch`. reading: of
    `operands.QueryBasis` and the softmax scale. q: (heads · blocks · rows, D) <-. score_bias:
    (heads · blocks · rows,) <-.
    """
    address, stride = source
    heads, group, tokens, blocks, block_tokens, block_rows, _ = batch
    basis, scale = reading
    matrix, center, outlier_bias = basis
    size = q.shape[1]
    x = np.zeros((block_rows, size), np.float32)
    for part in range(first, after):
        head, block = _block_of(part, heads, blocks)
        base, start = (head * blocks + block) * block_rows, block * block_tokens
        rows = (min(tokens, start + block_tokens) - start) * group
        for row in range(rows):
            at = (start + row // group) * stride + (head * group + row % group) * size
            query = row_at(address, at, size, like)
            score_bias[base + row], _ = prepare_query(query, center[head], outlier_bias[head], scale, x[row])
        if matrix.shape[1]:
            multiply(x, rows, size, matrix, head * size * size, q[base : base + block_rows])
        else:
            for row in range(block_rows):
                q[base + row] = x[row]


@njit(cache=True, nogil=True)
def _load_row(raw, raw16, half, at, bits, row):
    """One row of a page as float32: codes as they are."""
    size = row.shape[0]
    if bits == 16:
        words = raw16[at // 2 : at // 2 + size]
        for d in range(size):
            row[d] = to_float(words[d])
    elif bits == 17:
        words = raw16[at // 2 : at // 2 + size]
        for d in range(size):
            row[d] = half[words[d]]
    else:
        load_codes(raw, at, 1, size, bits, row.reshape(1, size))


@njit(cache=True, nogil=True)
def _dequantize(memory, codes_at, scales_at, bits, groups, midpoint, shift, rows):
    """rows <- PANEL keys or values side by side in a page. shift: (D,) what is added to keys with a marked scale."""
    raw, raw16, half = memory
    size = rows.shape[1]
    row_bytes = size * min(bits, 16) // 8
    for n in range(PANEL):
        _load_row(raw, raw16, half, codes_at + n * row_bytes, bits, rows[n])
    if groups > 1:
        scale_groups(raw16, half, scales_at, PANEL, size, groups, midpoint, rows)
        return
    for n in range(PANEL if bits < 16 else 0):
        scale, is_outlier = np.float32(1), False
        if groups == 1:
            scale = half[raw16[scales_at // 2 + n]]
            is_outlier = np.signbit(scale)
        less, by = splat(-midpoint), splat(abs(scale))
        for d in range(n * size, (n + 1) * size, WIDTH):
            store(rows, d, (load(rows, d) + less) * by)
        if is_outlier and shift.shape[0]:
            for d in range(0, size, WIDTH):
                store(rows, n * size + d, load(rows, n * size + d) + load(shift, d))


@njit(cache=True, nogil=True)
def dequantize_tile(first, after, pool, table, tile, outlier_shift, keys, values):
    """Parts first .. after - 1 of a tile, each PANEL keys and values of one head.

    pool: `pages.Pool`. table: (blocks,) of the request. tile: the positions of its first key and behind its last.
    keys: (heads, tile / PANEL, D, PANEL) <-. values: (heads, tile / piece, D / PANEL, piece, PANEL) <-.
    """
    pages, piece = pool.pages[0], values.shape[3]
    block_size, k_groups, v_groups = pages.block_size, pages.k_groups, pages.v_groups
    memory = pool.raw, pool.raw16, pool.half
    heads, size = keys.shape[0], keys.shape[2]
    k_bytes, v_bytes = size * min(pages.k_bits, 16) // 8, size * min(pages.v_bits, 16) // 8
    rows = np.empty((PANEL, size), np.float32)
    for part in range(first, after):
        head, group = part % heads, part // heads
        position = tile[0] + group * PANEL
        offset = position % block_size
        page = np.int64(table[position // block_size]) * pages.block_stride + head * pages.head_stride
        codes, scales = page + offset * k_bytes, page + pages.k_scale_offset + offset * 2 * k_groups
        _dequantize(memory, codes, scales, pages.k_bits, k_groups, pages.k_midpoint, outlier_shift[head], rows)
        at = (head * keys.shape[1] + group) * size * PANEL
        for d in range(size):
            for n in range(0, PANEL, WIDTH):
                store(keys, at + d * PANEL + n, load_every(rows, n * size + d, size))
        codes = page + pages.v_offset + offset * v_bytes
        scales = page + pages.v_scale_offset + offset * 2 * v_groups
        _dequantize(memory, codes, scales, pages.v_bits, v_groups, pages.v_midpoint, outlier_shift[head][:0], rows)
        at = (head * values.shape[1] + group * PANEL // piece) * size * piece + group * PANEL % piece * PANEL
        for n in range(PANEL):
            for d in range(0, size, WIDTH):
                store(values, at + (d // PANEL * piece + n) * PANEL + d % PANEL, load(rows, n * size + d))


@njit(cache=True, nogil=True)
def _highest(scores, at, count, m_i):
    """The largest of m_i and of `count` scores, NaN left out."""
    found = splat(m_i)
    for n in range(0, count, WIDTH):
        found = larger(first_of(count - n, load(scores, at + n), found), found)
    return largest(found)


@njit(cache=True, nogil=True)
def _weigh(scores, at, count, m_i):
    """scores <- e^(scores - m_i). Returns their sum. What the last WIDTH hold behind them becomes 0."""
    less, nothing = splat(-m_i), splat(np.float32(0))
    sums = nothing
    for n in range(0, count, WIDTH):
        weight = first_of(count - n, exp(load(scores, at + n) + less), nothing)
        sums = sums + weight
        store(scores, at + n, weight)
    return total(sums)


@njit(cache=True, nogil=True)
def _dot(x, at, y, begin):
    sums = splat(np.float32(0))
    for d in range(0, x.shape[1], WIDTH):
        sums = fma(load(x, at + d), load(y, begin + d), sums)
    return total(sums)


@njit(cache=True, nogil=True)
def _add_scaled(x, at, y, begin, weight):
    """x <- x + weight · y."""
    by = splat(weight)
    for d in range(0, x.shape[1], WIDTH):
        store(x, at + d, fma(load(y, begin + d), by, load(x, at + d)))


@njit(cache=True, nogil=True)
def _cap(scores, at, count, bias, soft_cap):
    for n in range(at, at + count):
        scores[0, n] = soft_cap * np.tanh((scores[0, n] + bias) / soft_cap)


@njit(cache=True, nogil=True)
def _softmax_row(scores, at, piece, span, position, token, head, row, q, bias, residual, rule, m_i, l_i, values):
    """Scores of one row become weights, what its row holds is rescaled, and residuals are added to both.

    at: where in `scores` the row begins. piece: the position of its first score. span: positions of the first key and
    behind the last one that the rows beside it see: outside of what this one sees weights are 0. token: of the batch.
    residual: those of keys and of values, (BEFORE + tokens, heads, D) or empty. rule: block size, slots from a token to
    its residual (0: none), window, soft cap.
    """
    begin, end = span
    block_size, distance, window, soft_cap = rule
    first, last = max(begin, position - window + 1) if window > 0 else begin, min(end, position + 1)
    if first >= last:
        for n in range(begin, end):
            scores[0, at + n - piece] = np.float32(0)
        return
    size = q.shape[1]
    # Tokens that this query reads with their residuals
    offset = position % block_size
    near = max(first, position - min(offset, distance - 1)) if distance > 0 else last
    behind = min(last, position - offset + block_size - distance) if distance > 0 else last
    r_keys, r_values = residual
    for n in range(near, behind if r_keys.shape[0] else near):
        place = ((token + distance - 1 - (position - n)) * r_keys.shape[1] + head) * size
        scores[0, at + n - piece] += _dot(q, row * size, r_keys, place)
    where, count = at + first - piece, last - first
    if soft_cap > 0:
        _cap(scores, where, count, bias, soft_cap)
    m_new = _highest(scores, where, count, m_i[row])
    alpha = np.exp(m_i[row] - m_new)
    m_i[row] = m_new
    l_i[row] = l_i[row] * alpha + _weigh(scores, where, count, m_new)
    for n in range(begin, first):
        scores[0, at + n - piece] = np.float32(0)
    for n in range(last, end):
        scores[0, at + n - piece] = np.float32(0)
    if alpha != np.float32(1):
        by = splat(alpha)
        for d in range(row * size, (row + 1) * size, WIDTH):
            store(values, d, load(values, d) * by)
    for n in range(near, behind if r_values.shape[0] else near):
        place = ((token + distance - 1 - (position - n)) * r_values.shape[1] + head) * size
        _add_scaled(values, row * size, r_values, place, scores[0, at + n - piece])


@njit(cache=True, nogil=True)
def attend_tile(first, after, tile, batch, keys, values, carried, residual, rule):
    """Parts first .. after - 1 over a tile of keys.

    tile, keys, values: of `dequantize_tile`. residual, rule: as for `_softmax_row`.
    """
    q, score_bias, m_i, l_i, acc = carried
    tile_first, tile_after = tile
    heads, group, tokens, blocks, block_tokens, block_rows, first_position = batch
    window = rule[2]
    size, piece_keys = q.shape[1], values.shape[3]
    width = piece_keys + SLACK
    scores = np.zeros((1, ROWS_TOGETHER * width), np.float32)
    for part in range(first, after):
        head, block = _block_of(part, heads, blocks)
        base, start = (head * blocks + block) * block_rows, block * block_tokens
        count = min(tokens, start + block_tokens) - start
        block_end = min(tile_after, first_position + start + count)
        for piece in range(tile_first, block_end, piece_keys):
            k_at = (head * keys.shape[1] + (piece - tile_first) // PANEL) * size * PANEL
            v_at = (head * values.shape[1] + (piece - tile_first) // piece_keys) * size * piece_keys
            for row in range(0, count * group, ROWS_TOGETHER):
                rows = min(ROWS_TOGETHER, count * group - row)
                oldest, newest = (
                    first_position + start + row // group,
                    first_position + start + (row + rows - 1) // group,
                )
                begin = max(piece, oldest - window + 1) if window > 0 else piece
                end = min(min(piece + piece_keys, tile_after), newest + 1)
                if begin >= end:
                    continue
                for panel in range((begin - piece) // PANEL, (end - piece + PANEL - 1) // PANEL):
                    for six in range(0, rows, ROWS):
                        place = six * width + panel * PANEL
                        k_panel = k_at + panel * size * PANEL
                        multiply_six(q, (base + row + six) * size, size, keys, k_panel, size, scores, place, width)
                for r in range(rows):
                    token = start + (row + r) // group
                    _softmax_row(
                        scores,
                        r * width,
                        piece,
                        (begin, end),
                        first_position + token,
                        token,
                        head,
                        base + row + r,
                        q,
                        score_bias[base + row + r],
                        residual,
                        rule,
                        m_i,
                        l_i,
                        acc,
                    )
                for panel in range(size // PANEL):
                    v_panel = v_at + (panel * piece_keys + begin - piece) * PANEL
                    for six in range(0, rows, ROWS):
                        place = (base + row + six) * size + panel * PANEL
                        weights = six * width + begin - piece
                        add_six(scores, weights, width, values, v_panel, end - begin, acc, place, size)


@njit(cache=True, nogil=True)
def finish(first, after, target, like, batch, restoring, carried):
    """Outputs of parts first .. after - 1 out of the basis of the stored values, into the output tensor.

    target: as `source` of `begin`. restoring: `operands.OutputBasis`, the sinks of `plan.Softmax`, and whether scores
    came without `score_bias`, which only a sink logit notices.
    """
    address, stride = target
    heads, group, tokens, blocks, block_tokens, block_rows, _ = batch
    (matrix, center), sinks, bare = restoring
    _, score_bias, m_i, l_i, acc = carried
    size = acc.shape[1]
    of_keys = np.empty(block_rows, np.float32)
    y = np.empty((block_rows, size), np.float32)
    for part in range(first, after):
        head, block = _block_of(part, heads, blocks)
        base, start = (head * blocks + block) * block_rows, block * block_tokens
        rows = (min(tokens, start + block_tokens) - start) * group
        for row in range(base, base + rows):
            highest = m_i[row] + score_bias[row] if bare else m_i[row]
            of_keys[row - base] = share_of_keys(sinks, head, (row - base) % group, highest, l_i[row])
            by = splat(of_keys[row - base] / l_i[row])
            for d in range(row * size, (row + 1) * size, WIDTH):
                store(acc, d, load(acc, d) * by)
        attended = acc[base : base + block_rows]
        if matrix.shape[1]:
            multiply(attended, rows, size, matrix, head * size * size, y)
            attended = y
        for row in range(rows):
            at = (start + row // group) * stride + (head * group + row % group) * size
            out = row_at(address, at, size, like)
            for d in range(size):
                out[d] = from_float(attended[row, d] + of_keys[row] * center[head, d], out[d])
