"""One run of pages in one request and KV head: scores, online softmax, weighted values, compiled.

An online softmax (Milakov & Gimelshein, arXiv 1805.02867) keeps a maximum, a sum and a weighted value a query.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fraqtl_kernels.cpu.kernels.codes import FAST, are_direct, load_pages
from fraqtl_kernels.cpu.kernels.rows import run_rows
from fraqtl_kernels.cpu.kernels.softmax import highest, load_scales, scale_scores, weigh

TILE_TOKENS = 256  # scored at once
TILE_FLOATS = 4096  # of codes turned to floats at once: half a first-level cache
SLACK = 8  # scores beyond the last one that may be overwritten, see `rows.row_function`


@njit(fastmath=FAST, cache=True, nogil=True)
def _cap(row, first, last, soft_cap):
    for n in range(first, last):
        row[n] = soft_cap * np.tanh(row[n] / soft_cap)


@njit(cache=True, nogil=True)
def _seen(position, begin, end, window):
    """Of keys begin .. end - 1, the first that a query at `position` sees, and the one after the last."""
    first = max(begin, position - window + 1) if window > 0 else begin
    return first, min(end, position + 1)


@njit(fastmath=FAST, cache=True, nogil=True)
def attend_run(
    q,
    terms,
    pool,
    table,
    positions,
    first_block,
    after,
    head,
    window,
    soft_cap,
    m_i,
    l_i,
    values,
):
    """One run of blocks of one request and KV head.

    q: (M, D). terms: (3, M), sum(q), `score_bias` and `outlier_bias` of `Queries`. table: (blocks,) of the request.
    positions: of its query tokens. first_block, after: the run's first block and the one after its last. m_i, l_i:
    (M,), values: (M, D), the run's results, see `decode.py`. pool: `pages.Pool`.
    """
    pages = pool.pages[0]
    block_size, block_stride = pages.block_size, pages.block_stride
    k_groups, v_groups, k_distance, v_distance = pages.k_groups, pages.v_groups, pages.k_distance, pages.v_distance
    k_midpoint, v_midpoint = pages.k_midpoint, pages.v_midpoint
    queries, size = q.shape
    together = positions.shape[0] == 1  # all queries see the same keys
    k_direct, v_direct = are_direct(pages.k_bits, k_groups, size), are_direct(pages.v_bits, v_groups, size)
    gang = max(1, (TILE_TOKENS if k_direct and v_direct else TILE_FLOATS // size) // block_size)
    tokens = gang * block_size
    tile = np.empty((1 if k_direct and v_direct else tokens, size), np.float32)
    in_tile = np.arange(gang).astype(np.int32)
    k_scales, v_scales = np.ones(tokens + SLACK, np.float32), np.ones(tokens + SLACK, np.float32)
    scores, weights = np.empty((2, queries, tokens + SLACK), np.float32)
    scaled_sums = np.zeros(queries, np.float32)  # of weight times V scale: takes the midpoint off at the end
    m_i[:] = -np.inf
    l_i[:] = 0
    values[:] = 0
    first_page = pool.raw.ctypes.data + head * pages.head_stride
    last_position, first_position = positions[-1], positions[0]
    block = first_block
    while block < after:
        # Whole blocks together, the newest by itself: it has the residuals, beyond its end
        blocks = max(1, min(gang, after - block, (last_position + 1) // block_size - block))
        numbers = table[block : block + blocks]
        block_start = block * block_size
        begin = max(0, first_position - window + 1 - block_start) if window > 0 else 0
        end = min(blocks * block_size, last_position + 1 - block_start)
        k_load_end = end if blocks > 1 else min(block_size, end + k_distance)
        v_load_end = end if blocks > 1 else min(block_size, end + v_distance)
        for i in range(blocks):
            page, at = first_page + np.int64(numbers[i]) * block_stride, i * block_size
            if k_groups == 1:
                load_scales(page + pages.k_scale_offset, block_size, k_scales, at)
            if v_groups == 1:
                load_scales(page + pages.v_scale_offset, block_size, v_scales, at)
        source = first_page, numbers.ctypes.data, block_stride
        if not k_direct:
            load_pages(pool, numbers, head, 0, k_load_end, tile)
            source = tile.ctypes.data, in_tile.ctypes.data, 4 * block_size * size
        to = scores.ctypes.data, tokens + SLACK
        run_rows(pages.k_rows, (queries, q.ctypes.data, *source, block_size, 0, k_load_end, *to))
        for m in range(queries):
            row, weight, value = scores[m], weights[m], values[m]
            if pages.k_bits < 16:
                zero = k_midpoint * terms[0, m]
                for n in range(max(end, k_distance), k_load_end):
                    row[n] = (row[n] - zero) * abs(k_scales[n])
                scale_scores(row, end, zero, terms[1, m], terms[2, m], k_scales)  # nobody reads before `begin`
                for n in range(max(end, k_distance), k_load_end):
                    row[n - k_distance] += row[n]
            first, last = _seen(positions[m % positions.shape[0]] - block_start, begin, end, window)
            if last <= first:
                continue
            if soft_cap > 0:
                _cap(row, first, last, soft_cap)
            m_new = highest(row, first, last, m_i[m])
            alpha = np.exp(m_i[m] - m_new)
            m_i[m] = m_new
            added, added_scaled = weigh(row, first, last, m_new, v_scales, weight)
            l_i[m] = l_i[m] * alpha + added
            for n in range(max(end, first + v_distance), v_load_end):
                weight[n] = np.exp(row[n - v_distance] - m_new) * abs(v_scales[n])
                added_scaled += weight[n]
            scaled_sums[m] = scaled_sums[m] * alpha + added_scaled
            if alpha != np.float32(1):
                for d in range(size):
                    value[d] *= alpha
        source = first_page + pages.v_offset, numbers.ctypes.data, block_stride
        if not v_direct:
            load_pages(pool, numbers, head, 1, v_load_end, tile)
            source = tile.ctypes.data, in_tile.ctypes.data, 4 * block_size * size
        for m in range(1 if together else queries):
            count, first, last = queries, begin, end
            if not together:
                count = 1
                first, last = _seen(positions[m % positions.shape[0]] - block_start, begin, end, window)
            where = (count, values[m].ctypes.data, *source, block_size)
            by = weights[m].ctypes.data, tokens + SLACK
            if first < last:
                run_rows(pages.v_rows, (*where, first, last, *by))
            if max(end, first + v_distance) < v_load_end:
                run_rows(pages.v_rows, (*where, max(end, first + v_distance), v_load_end, *by))
        block += blocks
    for m in range(queries):
        value = values[m]
        for d in range(size if v_groups <= 1 else 0):
            value[d] -= v_midpoint * scaled_sums[m]


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def attend_runs(q, q_terms, pool, table, positions, runs, window, soft_cap, m_i, l_i, out):
    """See `decode` and `attend_run`. runs: (runs, 3) request of the bucket, its first block, the one after its last.

    q_terms: (3, R, KV heads, M).
    """
    heads = q.shape[1]
    for item in prange(runs.shape[0] * heads):
        run, head = item // heads, item % heads
        request = runs[run, 0]
        attend_run(
            q[request, head],
            q_terms[:, request, head],
            pool,
            table[request],
            positions[request],
            runs[run, 1],
            runs[run, 2],
            head,
            window,
            soft_cap,
            m_i[run, head],
            l_i[run, head],
            out[run, head],
        )
