"""CPU decode attention, compiled: few queries a request, all of its keys, straight from the pages.

The work is split into runs of blocks of one (request, KV head), so that a single long request keeps
all cores busy. A run walks its pages once: the codes of some blocks become floats in a buffer that
stays in the first-level cache, all query heads of the KV head use it, and an online softmax
(Milakov & Gimelshein, arXiv 1805.02867) keeps a maximum, a sum and a weighted value a query.
`combine` joins the runs of a request: out = Σ e^(max_i - max) · acc_i / Σ e^(max_i - max) · sum_i.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY
from fraqtl_kernels.cpu.codes import FAST, half_table, load_codes, load_scales, scale_groups
from fraqtl_kernels.cpu.queries import Queries, prepare_queries
from fraqtl_kernels.cpu.tiles import Bucket
from fraqtl_kernels.formats import DEFAULT_FORMAT, SCALE_BYTES, VectorFormat, get_format
from fraqtl_kernels.pages import PageLayout
from fraqtl_kernels.refinement import DISTANCE

RUN_TOKENS = 512  # no run is shorter than this, unless the context is
RUNS_PER_THREAD = 4
TILE_FLOATS = 4096  # of codes turned to floats at once: half a first-level cache

_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)


@njit(fastmath=FAST, cache=True, nogil=True)
def _exp(x, power, power_bits, count):
    """x[:count] = e^x for x <= 0, to a few units in the last place; vectorises, which libm's does not.

    e^x = 2^n · e^r with n = round(x · log2 e), |r| <= ln(2)/2 and a Taylor polynomial for e^r.
    """
    for i in range(count):
        y = max(x[i], np.float32(-87.0))
        n = np.floor(y * _LOG2_E + np.float32(0.5))
        r = y - n * _LN_2
        e = np.float32(1 / 5040) * r + np.float32(1 / 720)
        e = e * r + np.float32(1 / 120)
        e = e * r + np.float32(1 / 24)
        e = e * r + np.float32(1 / 6)
        e = e * r + np.float32(0.5)
        e = (e * r + np.float32(1)) * r + np.float32(1)
        power_bits[i] = (np.int32(n) + np.int32(127)) << 23
        x[i] = e * power[i] if x[i] > np.float32(-87.0) else (x[i] if x[i] != x[i] else np.float32(0))


@njit(fastmath=FAST, cache=True, nogil=True)
def _score_two(first, second, tile, begin, end, size, first_scores, second_scores):
    """scores[n] = query · tile[n] of two queries, for tokens begin .. end - 1."""
    for n in range(begin, end):
        row = tile[n]
        a, b = np.float32(0), np.float32(0)
        for d in range(size):
            a += first[d] * row[d]
            b += second[d] * row[d]
        first_scores[n], second_scores[n] = a, b


@njit(fastmath=FAST, cache=True, nogil=True)
def _score(queries, tile, begin, end, size, scores):
    """scores[m, n] = queries[m] · tile[n] for tokens begin .. end - 1."""
    last = queries.shape[0] - 1
    for m in range(0, queries.shape[0], 2):
        other = min(m + 1, last)  # an odd one is taken twice
        _score_two(queries[m], queries[other], tile, begin, end, size, scores[m], scores[other])


@njit(fastmath=FAST, cache=True, nogil=True)
def _scale_scores(row, count, zero, offset, sink, scales, sinks):
    """Products with codes become scores, for tokens 0 .. count - 1."""
    for n in range(count):
        row[n] = (row[n] - zero) * scales[n] + (offset + sinks[n] * sink)


@njit(fastmath=FAST, cache=True, nogil=True)
def _cap(row, first, last, soft_cap):
    for n in range(first, last):
        row[n] = soft_cap * np.tanh(row[n] / soft_cap)


@njit(fastmath=FAST, cache=True, nogil=True)
def _highest(row, first, last, top):
    """The largest of `top` and row[first:last]; NaN if one is."""
    broken = np.float32(0)
    for n in range(first, last):
        top = max(top, row[n])
        broken += row[n] * np.float32(0)
    return top if broken == broken else broken


@njit(fastmath=FAST, cache=True, nogil=True)
def _weigh(row, first, last, top, scales, weights, power, power_bits):
    """weights[i] = e^(row[first + i] - top) · scales[first + i]; returns their sums without and with the scales."""
    count, scores, of_values = last - first, row[first:last], scales[first:last]
    for i in range(count):
        weights[i] = scores[i] - top
    _exp(weights, power, power_bits, count)
    added, added_scaled = np.float32(0), np.float32(0)
    for i in range(count):
        added += weights[i]
        weights[i] *= of_values[i]
        added_scaled += weights[i]
    return added, added_scaled


@njit(fastmath=FAST, cache=True, nogil=True)
def _add_values(weights, tile, first, last, size, value):
    """value += Σ weights[n - first] · tile[n] for tokens first .. last - 1, four at a time."""
    fours = first + (last - first) // 4 * 4
    for n in range(first, fours, 4):
        a, b, c, e = tile[n], tile[n + 1], tile[n + 2], tile[n + 3]
        i = n - first
        at_a, at_b, at_c, at_e = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for d in range(size):
            value[d] += at_a * a[d] + at_b * b[d] + at_c * c[d] + at_e * e[d]
    for n in range(fours, last):
        row, weight = tile[n], weights[n - first]
        for d in range(size):
            value[d] += weight * row[d]


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
    best,
    sums,
    values,
):
    """One run of blocks of one request and KV head.

    q: (M, D). terms: (3, M), sum(q), base and sink of `Queries`. table: (blocks,) of the request. positions: of its
    query tokens. first_block, after: the run's first block and the one after its last. best, sums: (M,), values:
    (M, D), the run's results, see the module's docstring.
    sizes: block size, K and V bits, K and V scales a token, block stride, head stride, V offset, K and V scale offsets,
    slots from tokens to their refinements (of K and V, 0 if they have none).
    """
    block_size, k_bits, v_bits, k_groups, v_groups = sizes[:5]
    block_stride, head_stride, v_offset, ks_offset, vs_offset, k_distance, v_distance = sizes[5:]
    queries, size = q.shape
    gang = max(1, TILE_FLOATS // (block_size * size))
    tokens = gang * block_size
    tile_bits = np.empty((tokens, size), np.int32)
    tile = tile_bits.view(np.float32)
    weights = np.empty(tokens, np.float32)
    power_bits = np.empty(tokens, np.int32)
    power = power_bits.view(np.float32)
    k_scales, v_scales = np.ones(tokens, np.float32), np.ones(tokens, np.float32)
    sinks = np.zeros(tokens, np.float32)
    scores = np.empty((queries, tokens), np.float32)
    scaled_sums = np.zeros(queries, np.float32)  # of weight times V scale: takes the midpoint off at the end
    best[:] = -np.inf
    sums[:] = 0
    values[:] = 0
    newest, oldest = positions[-1], positions[0]
    block = first_block
    while block < after:
        # Whole blocks together, the newest by itself: it has the refinements, beyond its end
        blocks = max(1, min(gang, after - block, (newest + 1) // block_size - block))
        base = block * block_size
        begin = max(0, oldest - window + 1 - base) if window > 0 else 0
        end = min(blocks * block_size, newest + 1 - base)
        reach = end if blocks > 1 else min(block_size, end + k_distance)
        for i in range(blocks):
            page = np.int64(table[block + i]) * block_stride + head * head_stride
            part, count = slice(i * block_size, (i + 1) * block_size), min(block_size, reach - i * block_size)
            load_codes(raw, raw16, half, page, count, size, k_bits, tile[part], tile_bits[part])
            if k_groups == 1:
                load_scales(raw16, page + ks_offset, count, power_bits, power, k_scales[part])
                signs, sunk = raw16[(page + ks_offset) // 2 : (page + ks_offset) // 2 + count], sinks[part]
                for n in range(count):
                    sunk[n] = np.float32(signs[n] >> 15)
        _score(q, tile, begin, reach, size, scores)
        if k_bits < 16:
            for m in range(queries):
                zero = midpoints[0] * terms[0, m]
                offset, sink = terms[1, m], terms[2, m]
                _scale_scores(scores[m], end, zero, offset, sink, k_scales, sinks)  # before `begin` nobody reads
                for n in range(max(end, k_distance), reach):
                    scores[m, n - k_distance] += (scores[m, n] - zero) * k_scales[n]
        reach = end if blocks > 1 else min(block_size, end + v_distance)
        for i in range(blocks):
            page = np.int64(table[block + i]) * block_stride + head * head_stride
            part, count = slice(i * block_size, (i + 1) * block_size), min(block_size, reach - i * block_size)
            load_codes(raw, raw16, half, page + v_offset, count, size, v_bits, tile[part], tile_bits[part])
            if v_groups == 1:
                load_scales(raw16, page + vs_offset, count, power_bits, power, v_scales[part])
            elif v_groups > 1:
                scale_groups(raw16, half, page + vs_offset, count, size, v_groups, midpoints[1], tile[part])
        for m in range(queries):
            position = positions[m % positions.shape[0]]
            last = min(end, position + 1 - base)
            first = max(begin, position - window + 1 - base) if window > 0 else begin
            if last <= first:
                continue
            row, value = scores[m], values[m]
            if soft_cap > 0:
                _cap(row, first, last, soft_cap)
            top = _highest(row, first, last, best[m])
            decay = np.exp(best[m] - top)
            best[m] = top
            added, added_scaled = _weigh(row, first, last, top, v_scales, weights, power, power_bits)
            sums[m] = sums[m] * decay + added
            scaled_sums[m] = scaled_sums[m] * decay + added_scaled
            if decay != np.float32(1):
                for d in range(size):
                    value[d] *= decay
            _add_values(weights, tile, first, last, size, value)
            for n in range(max(end, first + v_distance), reach):
                weight = np.exp(row[n - v_distance] - top) * v_scales[n]
                scaled_sums[m] += weight
                finer = tile[n]
                for d in range(size):
                    value[d] += weight * finer[d]
        block += blocks
    for m in range(queries):
        value = values[m]
        for d in range(size if v_groups <= 1 else 0):
            value[d] -= midpoints[1] * scaled_sums[m]


@njit(parallel=True, fastmath=FAST, cache=True, nogil=True)
def _decode(
    q, q_terms, raw, raw16, half, table, positions, runs, sizes, midpoints, window, soft_cap, highest, total, out
):
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
            highest[run, head],
            total[run, head],
            out[run, head],
        )


def page_sizes(pool: Tensor, layout: PageLayout, *, refined: bool) -> tuple[int, ...]:
    """`sizes` of `attend_run`. refined: whether pages hold the refinements of the newest tokens."""
    k, v = layout.format.k, layout.format.v
    offsets = (layout.v_offset, layout.k_scale_offset, layout.v_scale_offset)
    groups = (k.scale_bytes // SCALE_BYTES, v.scale_bytes // SCALE_BYTES)
    distances = tuple(DISTANCE if refined and x.refined else 0 for x in (k, v))
    return (layout.block_size, _kind(k), _kind(v), *groups, pool.stride(0), pool.stride(1), *offsets, *distances)


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
    highest, total = q.new_empty(shape), q.new_empty(shape)
    out = q.new_empty(*shape, q.shape[-1])
    raw = pool_bytes(pool)
    _decode(
        q.numpy(),
        torch.stack([queries.total, queries.base, queries.sink]).numpy(),
        raw,
        raw.view(np.uint16),
        half_table(),
        block_table.numpy(),
        positions.numpy(),
        runs.numpy(),
        # A position's refinements stand in the pages only until the next one comes.
        page_sizes(pool, layout, refined=positions.shape[1] == 1),
        grid_midpoints(layout),
        window or 0,
        np.float32(soft_cap or 0),
        highest.numpy(),
        total.numpy(),
        out.numpy(),
    )
    return _combine(runs[:, 0], len(bucket.rows), highest, total, out)


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


def _combine(request: Tensor, count: int, highest: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """Join the runs of every request; see the module's docstring."""
    if len(request) == count:
        return out / total[..., None]
    index = request[:, None, None].expand_as(highest)
    top = highest.new_full((count, *highest.shape[1:]), -torch.inf).scatter_reduce(0, index, highest, "amax")
    # A run that a query sees nothing of has -inf; where all have, its request can't be in the batch.
    weight = (highest - top[request]).exp()
    joined = out.new_zeros(count, *out.shape[1:]).index_add_(0, request, out * weight[..., None])
    return joined / torch.zeros_like(top).index_add_(0, request, total * weight)[..., None]
