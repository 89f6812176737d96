"""CPU decode attention, compiled: few queries a request, all of its keys, straight from the pages.

The work is split into runs of blocks of one (request, KV head), so that a single long request keeps
all cores busy. A run walks its pages once, some at a time: all query heads of the KV head go over
the codes together (`rows.py`), and an online softmax (Milakov & Gimelshein, arXiv 1805.02867) keeps a
maximum, a sum and a weighted value a query (`softmax.py`).
`combine` joins the runs of a request: out = Σ e^(max_i - max) · acc_i / Σ e^(max_i - max) · sum_i.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.cpu.codes import FAST, are_direct, half_table, load_pages
from fraqtl_kernels.cpu.plan import Bucket
from fraqtl_kernels.cpu.queries import Queries, prepare_queries
from fraqtl_kernels.cpu.rows import FLOATS, row_function, run_rows
from fraqtl_kernels.cpu.softmax import highest, load_scales, scale_scores, weigh
from fraqtl_kernels.formats import DEFAULT_FORMAT, SCALE_BYTES, VectorFormat, get_format
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.residual import DISTANCE

RUN_TOKENS = 512  # no run is shorter than this, unless the context is
RUNS_PER_THREAD = 4
TILE_TOKENS = 256  # scored at once
TILE_FLOATS = 4096  # of codes turned to floats at once: half a first-level cache
SLACK = 8  # scores beyond the last one that may be overwritten, see `rows.score_rows`


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
    raw,
    raw16,
    half,
    table,
    positions,
    first_block,
    after,
    head,
    sizes,
    midpoints,
    window,
    soft_cap,
    m_i,
    l_i,
    values,
):
    """One run of blocks of one request and KV head.

    q: (M, D). terms: (3, M), sum(q), `score_bias` and `outlier_bias` of `Queries`. table: (blocks,) of the request.
    positions: of its query tokens. first_block, after: the run's first block and the one after its last. m_i, l_i:
    (M,), values: (M, D), the run's results, see the module's docstring.
    sizes: block size, K and V bits, K and V scales a token, block stride, head stride, V offset, K and V scale offsets,
    slots from tokens to their residuals (of K and V, 0 if they have none), addresses of their `row_function`.
    """
    block_size, k_bits, v_bits, k_groups, v_groups = sizes[:5]
    block_stride, head_stride, v_offset, ks_offset, vs_offset, k_distance, v_distance, k_rows, v_rows = sizes[5:]
    queries, size = q.shape
    together = positions.shape[0] == 1  # all queries see the same keys
    k_direct, v_direct = are_direct(k_bits, k_groups), are_direct(v_bits, v_groups)
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
    pages = raw.ctypes.data + head * head_stride
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
            page, at = pages + np.int64(numbers[i]) * block_stride, i * block_size
            if k_groups == 1:
                load_scales(page + ks_offset, block_size, k_scales, at)
            if v_groups == 1:
                load_scales(page + vs_offset, block_size, v_scales, at)
        source = pages, numbers.ctypes.data, block_stride
        if not k_direct:
            load_pages(raw, raw16, half, numbers, head, sizes, 0, midpoints, k_load_end, tile)
            source = tile.ctypes.data, in_tile.ctypes.data, 4 * block_size * size
        to = scores.ctypes.data, tokens + SLACK
        run_rows(k_rows, (queries, q.ctypes.data, *source, block_size, 0, k_load_end, *to))
        for m in range(queries):
            row, weight, value = scores[m], weights[m], values[m]
            if k_bits < 16:
                zero = midpoints[0] * terms[0, m]
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
        source = pages + v_offset, numbers.ctypes.data, block_stride
        if not v_direct:
            load_pages(raw, raw16, half, numbers, head, sizes, 1, midpoints, v_load_end, tile)
            source = tile.ctypes.data, in_tile.ctypes.data, 4 * block_size * size
        for m in range(1 if together else queries):
            count, first, last = queries, begin, end
            if not together:
                count = 1
                first, last = _seen(positions[m % positions.shape[0]] - block_start, begin, end, window)
            where = (count, values[m].ctypes.data, *source, block_size)
            by = weights[m].ctypes.data, tokens + SLACK
            if first < last:
                run_rows(v_rows, (*where, first, last, *by))
            if max(end, first + v_distance) < v_load_end:
                run_rows(v_rows, (*where, max(end, first + v_distance), v_load_end, *by))
        block += blocks
    for m in range(queries):
        value = values[m]
        for d in range(size if v_groups <= 1 else 0):
            value[d] -= midpoints[1] * scaled_sums[m]


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _decode(q, q_terms, raw, raw16, half, table, positions, runs, sizes, midpoints, window, soft_cap, m_i, l_i, out):
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
            raw,
            raw16,
            half,
            table[request],
            positions[request],
            runs[run, 1],
            runs[run, 2],
            head,
            sizes,
            midpoints,
            window,
            soft_cap,
            m_i[run, head],
            l_i[run, head],
            out[run, head],
        )


def page_sizes(pool: Tensor, layout: PageLayout, *, with_residual: bool) -> tuple[int, ...]:
    """`sizes` of `attend_run`. with_residual: whether pages hold the residuals of the newest tokens."""
    k, v = layout.format.k, layout.format.v
    offsets = (layout.v_offset, layout.k_scale_offset, layout.v_scale_offset)
    groups = (k.scale_bytes // SCALE_BYTES, v.scale_bytes // SCALE_BYTES)
    distances = tuple(DISTANCE if with_residual and x.has_residual else 0 for x in (k, v))
    bits, size = (_kind(k), _kind(v)), layout.head_size
    direct = [are_direct(*x) for x in zip(bits, groups, strict=True)]
    read_as = [x if is_direct else FLOATS for x, is_direct in zip(bits, direct, strict=True)]
    rows = row_function("score", read_as[0], size), row_function("add", read_as[1], size)
    strides = pool.stride(0), pool.stride(1)
    return (layout.block_size, *bits, *groups, *strides, *offsets, *distances, *(x.address for x in rows))


def grid_midpoints(layout: PageLayout) -> Any:
    """(2,) float32: what codes of K and of V are too large by."""
    return np.array([0.0 if x.is_raw else x.midpoint for x in (layout.format.k, layout.format.v)], np.float32)


def pool_bytes(pool: Tensor) -> Any:
    """All memory from the pool's first byte to the end of its storage, as one array of uint8."""
    return pool.as_strided((pool.untyped_storage().nbytes() // 2 * 2 - pool.storage_offset(),), (1,)).numpy()


def decode(
    queries: Queries,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    bucket: Bucket,
    *,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """Attention of a bucket of requests over their pages.

    block_table: (requests, blocks) int. Returns (R, KV heads, M, D) float32 like the queries, in the basis in which V
    is stored, static scales of V still to be applied.
    """
    q, positions = queries.q, bucket.positions
    block_table = block_table[
        bucket.rows
    ]  # a copy, so its memory layout, and with it the compiled code, is always the same
    runs = split_runs(positions, layout.block_size, pool.shape[1], window)
    shape = (len(runs), *q.shape[1:3])
    m_i, l_i = q.new_empty(shape), q.new_empty(shape)
    out = q.new_empty(*shape, q.shape[-1])
    raw = pool_bytes(pool)
    _decode(
        q.numpy(),
        torch.stack([queries.q_sum, queries.score_bias, queries.outlier_bias]).numpy(),
        raw,
        raw.view(np.uint16),
        half_table(),
        block_table.int().numpy(),
        positions.numpy(),
        runs.numpy(),
        # A position's residuals stand in the pages only until the next one comes.
        page_sizes(pool, layout, with_residual=positions.shape[1] == 1),
        grid_midpoints(layout),
        window or 0,
        np.float32(soft_cap or 0),
        m_i.numpy(),
        l_i.numpy(),
        out.numpy(),
    )
    return _combine(runs[:, 0], len(bucket.rows), m_i, l_i, out)


def warm_up_decode() -> None:
    """Compile the kernel, or load it from Numba's cache on disk, so that no request has to wait for it."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    table, rows, positions = (torch.zeros(shape, dtype=torch.int64) for shape in ((1, 1), (1,), (1, 1)))
    queries = prepare_queries(torch.zeros(1, 1, 1, 64, dtype=torch.float32), layout.format.k, IDENTITY, 1.0)
    decode(queries, pool, layout, table.int(), Bucket(rows, positions, positions), window=None, soft_cap=None)


def _kind(vector: VectorFormat) -> int:
    return 17 if vector.raw_dtype == torch.float16 else int(vector.bits)


def split_runs(positions: Tensor, block_size: int, heads: int, window: int | None) -> Tensor:
    """(runs, 3): request, first block, block after the last; runs of a request next to each other."""
    first = (positions[:, 0] - (window or 1 << 62) + 1).clamp_min(0) // block_size
    after = positions[:, -1] // block_size + 1
    wanted = max(1, RUNS_PER_THREAD * get_num_threads() // heads)
    length = max(RUN_TOKENS // block_size, -(-int((after - first).sum()) // wanted))
    runs = [
        (request, start, min(start + length, end))
        for request, (begin, end) in enumerate(zip(first.tolist(), after.tolist(), strict=True))
        for start in range(begin, end, length)
    ]
    return torch.tensor(runs)


def _combine(request: Tensor, count: int, m_i: Tensor, l_i: Tensor, out: Tensor) -> Tensor:
    """Join the runs of every request; see the module's docstring."""
    if len(request) == count:
        return out / l_i[..., None]
    index = request[:, None, None].expand_as(m_i)
    m_new = m_i.new_full((count, *m_i.shape[1:]), -torch.inf).scatter_reduce(0, index, m_i, "amax")
    # A run that a query sees nothing of has -inf; where all have, its request can't be in the batch.
    weight = (m_i - m_new[request]).exp()
    joined = out.new_zeros(count, *out.shape[1:]).index_add_(0, request, out * weight[..., None])
    return joined / torch.zeros_like(m_new).index_add_(0, request, l_i * weight)[..., None]
