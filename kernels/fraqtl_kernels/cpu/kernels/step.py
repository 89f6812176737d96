"""The three parts of a decode step, compiled; see `step.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fraqtl_kernels.cpu.kernels.codes import FAST
from fraqtl_kernels.cpu.kernels.decode import attend_run
from fraqtl_kernels.cpu.kernels.products import ROWS, multiply
from fraqtl_kernels.cpu.kernels.softmax import share_of_keys
from fraqtl_kernels.cpu.kernels.store import make_spaces, store_tile
from fraqtl_kernels.cpu.kernels.team import in_team
from fraqtl_kernels.cpu.kernels.tensors import prepare_query, row_at
from fraqtl_kernels.cpu.layers.bits import from_float


class Tensors(NamedTuple):
    """Queries, keys, values and outputs of a step. rows: (tokens,) of them that it is about. like: an array that says
    their dtype. writes: whether keys and values are to be stored."""

    rows: Any
    addresses: Any
    strides: Any
    like: Any
    writes: bool


class Paging(NamedTuple):
    """slots: (tokens of the batch,). table: (requests, blocks). positions: (requests, 1). runs: (runs, 3) of
    `split_runs`. starts: (requests + 1,) the first run of each request."""

    slots: Any
    table: Any
    positions: Any
    runs: Any
    starts: Any


class Layer(NamedTuple):
    """to_basis, from_basis: of `operands.LayerOperands`. scale, window, soft_cap: of the softmax, 0: none. sinks: of
    `plan.Softmax`."""

    to_basis: Any
    from_basis: Any
    scale: Any
    window: int
    soft_cap: Any
    sinks: Any


class Work(NamedTuple):
    """q: (tokens, KV heads, group, D). terms: (tokens, KV heads, 3, group). m_i, l_i: (runs, KV heads, group). values:
    (runs, KV heads, group, D). See `kernels/decode.py`."""

    q: Any
    terms: Any
    m_i: Any
    l_i: Any
    values: Any


@njit(fastmath=FAST, cache=True, nogil=True)
def _store(stream, tensors, row, head, size, slots, pool, batch, spaces):
    """The key (stream 0) or value (1) of one token and head, into its slot."""
    if batch.streams[stream].bits > 0:
        store_tile(head, row, row + 1, batch, stream, slots, pool, spaces)
        return
    slot, pages = slots[row], pool.pages[0]
    if slot < 0:
        return
    page = (slot // pages.block_size) * pages.block_stride + head * pages.head_stride
    place = page + batch.streams[stream].code_offset + slot % pages.block_size * 2 * size
    at = row * tensors.strides[1 + stream] + head * size
    source = row_at(tensors.addresses[1 + stream], at, size, tensors.like).view(np.uint16)
    target = pool.raw16[place // 2 : place // 2 + size]
    for d in range(size):
        target[d] = source[d]


@njit(cache=True, nogil=True)
def _workspaces(rows, size):
    """Two (>= rows, size) float32 arrays that `multiply` takes."""
    padded = (rows + ROWS - 1) // ROWS * ROWS
    return np.empty((padded, size), np.float32), np.empty((padded, size), np.float32)


@njit(fastmath=FAST, cache=True, nogil=True)
def _copy_and_add(x, y):
    """y <- x; returns sum(x)."""
    q_sum = np.float32(0)
    for d in range(x.shape[0]):
        q_sum += x[d]
        y[d] = x[d]
    return q_sum


@njit(fastmath=FAST, cache=True, nogil=True)
def _begin(item, tensors, paging, pool, batch, layer, work):
    """Step 1 of one (token, KV head)."""
    heads, group, size = work.q.shape[1:]
    matrix = layer.to_basis.matrix
    token, head = item // heads, item % heads
    row = tensors.rows[token]
    if tensors.writes:
        spaces = make_spaces(ROWS, size)
        for stream in range(2):
            _store(stream, tensors, row, head, size, paging.slots, pool, batch, spaces)
    x, y = _workspaces(group, size)
    terms = work.terms[token, head]
    for m in range(group):
        query = row_at(tensors.addresses[0], row * tensors.strides[0] + (head * group + m) * size, size, tensors.like)
        center, outlier_bias = layer.to_basis.center[head], layer.to_basis.outlier_bias[head]
        terms[1, m], terms[2, m] = prepare_query(query, center, outlier_bias, layer.scale, x[m])
    if matrix.shape[1]:
        multiply(x, group, size, matrix, head * size * size, y)
    for m in range(group):
        terms[0, m] = _copy_and_add(y[m] if matrix.shape[1] else x[m], work.q[token, head, m])


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _join(runs, head, m, m_i, l_i, values, weights, sinks):
    """Of one query, the sum of what its runs found goes to its first run; see the docstring of `decode.py`. Returns
    the weights of all keys together."""
    first, after = runs
    m_new = m_i[first, head, m]
    for run in range(first + 1, after):
        m_new = max(m_new, m_i[run, head, m])
    l_joined = np.float32(0)
    for run in range(first, after):
        weights[run - first] = np.exp(m_i[run, head, m] - m_new)
        l_joined += l_i[run, head, m] * weights[run - first]
    target = values[first, head, m]
    of_keys = share_of_keys(sinks, head, m, m_new, l_joined)
    for run in range(first, after):
        weight_share = weights[run - first] * of_keys / l_joined
        if run == first:
            for d in range(target.shape[0]):
                target[d] *= weight_share
        elif weight_share != 0:  # a run that the query sees nothing of
            other = values[run, head, m]
            for d in range(target.shape[0]):
                target[d] += weight_share * other[d]
    return of_keys


@njit(fastmath=FAST, cache=True, nogil=True)
def _finish(item, tensors, starts, layer, work):
    """Step 3 of one (token, KV head)."""
    heads, group, size = work.values.shape[1:]
    matrix, center = layer.from_basis.matrix, layer.from_basis.center
    x, y = _workspaces(group, size)
    token, head = item // heads, item % heads
    runs = starts[token], starts[token + 1]
    weights, of_keys = np.empty(runs[1] - runs[0], np.float32), np.empty(group, np.float32)
    for m in range(group):
        of_keys[m] = _join(runs, head, m, work.m_i, work.l_i, work.values, weights, layer.sinks)
        _copy_and_add(work.values[runs[0], head, m], x[m])
    if matrix.shape[1]:
        multiply(x, group, size, matrix, head * size * size, y)
    for m in range(group):
        at = tensors.rows[token] * tensors.strides[3] + (head * group + m) * size
        out = row_at(tensors.addresses[3], at, size, tensors.like)
        attended = y[m] if matrix.shape[1] else x[m]
        for d in range(size):
            out[d] = from_float(attended[d] + of_keys[m] * center[head, d], out[d])


@njit(fastmath=FAST, cache=True, nogil=True)
def run_parts(begin, end, number, tensors, paging, pool, batch, layer, work):
    """Parts begin .. end - 1 of step `number` of the docstring of `step.py`, or of all of them if it is 0.

    A part is a (token, KV head), in step 2 a (run, KV head). pool: `pages.Pool`. batch: `store.Batch`.
    """
    heads, runs = work.q.shape[1], paging.runs
    for part in range(begin, end):
        head = part % heads
        if number < 2:
            _begin(part, tensors, paging, pool, batch, layer, work)
        first, after = part // heads, part // heads + 1
        if number == 0:
            first, after = paging.starts[part // heads], paging.starts[part // heads + 1]
        elif number != 2:
            after = first
        for run in range(first, after):
            token = runs[run, 0]
            attend_run(
                work.q[token, head],
                work.terms[token, head],
                pool,
                paging.table[token],
                paging.positions[token],
                runs[run, 1],
                runs[run, 2],
                head,
                layer.window,
                layer.soft_cap,
                work.m_i[run, head],
                work.l_i[run, head],
                work.values[run, head],
            )
        if number == 0 or number == 3:
            _finish(part, tensors, paging.starts, layer, work)


@njit(cache=True, nogil=True)
def run_step(address, threads, at_once, tensors, paging, pool, batch, layer, work):
    """All parts of all steps on `threads` threads: the steps of a part one after another if `at_once`, else those of
    all parts, which is more even where requests are few. address: of `run_parts`.
    """
    heads = work.q.shape[1]
    parts, runs = paging.positions.shape[0] * heads, paging.runs.shape[0] * heads
    if at_once:
        in_team(address, min(threads, parts), parts, (0, tensors, paging, pool, batch, layer, work))
        return
    in_team(address, min(threads, parts), parts, (1, tensors, paging, pool, batch, layer, work))
    in_team(address, min(threads, runs), runs, (2, tensors, paging, pool, batch, layer, work))
    in_team(address, min(threads, parts), parts, (3, tensors, paging, pool, batch, layer, work))
