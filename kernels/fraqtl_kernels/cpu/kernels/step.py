"""The three parts of a decode step, compiled; see `step.py`."""

from __future__ import annotations

import numpy as np
from numba import njit

from fraqtl_kernels.cpu.kernels.codes import FAST
from fraqtl_kernels.cpu.kernels.decode import attend_run
from fraqtl_kernels.cpu.kernels.products import ROWS, multiply
from fraqtl_kernels.cpu.kernels.store import make_spaces, store_tile
from fraqtl_kernels.cpu.kernels.tensors import prepare_query, row_at
from fraqtl_kernels.cpu.layers.bits import from_float


@njit(fastmath=FAST, cache=True, nogil=True)
def _store(stream, address, stride, like, row, head, size, slots, raw, raw16, store, spaces):
    """The key (side 0) or value (side 1) of one token and head, into its slot."""
    tables, residual, hadamard_bases, whole, numbers, places, raw_at = store
    if whole[stream, 4] > 0:
        arrays = tables[stream], residual[stream], hadamard_bases[stream]
        store_tile(head, row, row + 1, arrays, whole[stream], numbers[stream], slots, raw, raw16, places, spaces)
        return
    slot = slots[row]
    if slot < 0:
        return
    block_size, block_stride, head_stride = places[:3]
    place = (slot // block_size) * block_stride + head * head_stride + raw_at[stream] + slot % block_size * 2 * size
    source = row_at(address, row * stride + head * size, size, like).view(np.uint16)
    target = raw16[place // 2 : place // 2 + size]
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
def _begin(begin, end, rows, addresses, strides, like, writes, slots, raw, raw16, storing, reading, q, terms):
    """Step 1 of items begin .. end - 1."""
    matrix, center, outlier_shift, scale = reading
    heads, group, size = q.shape[1:]
    spaces = make_spaces(ROWS, size)
    x, y = _workspaces(group, size)
    for item in range(begin, end):
        token, head = item // heads, item % heads
        row = rows[token]
        for stream in range(2 if writes else 0):
            at, stride = addresses[1 + stream], strides[1 + stream]
            _store(stream, at, stride, like, row, head, size, slots, raw, raw16, storing, spaces)
        for m in range(group):
            query = row_at(addresses[0], row * strides[0] + (head * group + m) * size, size, like)
            terms[token, head, 1, m], terms[token, head, 2, m] = prepare_query(
                query, center[head], outlier_shift[head], scale, x[m]
            )
        if matrix.shape[1]:
            multiply(x, group, size, matrix, head * size * size, y)
        for m in range(group):
            terms[token, head, 0, m] = _copy_and_add(y[m] if matrix.shape[1] else x[m], q[token, head, m])


@njit(fastmath=FAST, cache=True, nogil=True, error_model="numpy")
def _join(runs, head, m, m_i, l_i, values, weights):
    """Of one query, the sum of what its runs found goes to its first run; see the docstring of `decode.py`."""
    first, after = runs
    m_new = m_i[first, head, m]
    for run in range(first + 1, after):
        m_new = max(m_new, m_i[run, head, m])
    l_joined = np.float32(0)
    for run in range(first, after):
        weights[run - first] = np.exp(m_i[run, head, m] - m_new)
        l_joined += l_i[run, head, m] * weights[run - first]
    target = values[first, head, m]
    for run in range(first, after):
        weight_share = weights[run - first] / l_joined
        if run == first:
            for d in range(target.shape[0]):
                target[d] *= weight_share
        elif weight_share != 0:  # a run that the query sees nothing of
            other = values[run, head, m]
            for d in range(target.shape[0]):
                target[d] += weight_share * other[d]


@njit(fastmath=FAST, cache=True, nogil=True)
def _finish(begin, end, rows, address, stride, like, starts, m_i, l_i, values, restoring):
    """Step 3 of items begin .. end - 1."""
    matrix, center = restoring
    heads, group, size = values.shape[1:]
    x, y = _workspaces(group, size)
    weights = np.empty(values.shape[0], np.float32)
    for item in range(begin, end):
        token, head = item // heads, item % heads
        for m in range(group):
            _join((starts[token], starts[token + 1]), head, m, m_i, l_i, values, weights)
            _copy_and_add(values[starts[token], head, m], x[m])
        if matrix.shape[1]:
            multiply(x, group, size, matrix, head * size * size, y)
        for m in range(group):
            out = row_at(address, rows[token] * stride + (head * group + m) * size, size, like)
            attended = y[m] if matrix.shape[1] else x[m]
            for d in range(size):
                out[d] = from_float(attended[d] + center[head, d], out[d])


@njit(fastmath=FAST, cache=True, nogil=True)
def run_step(
    number,
    begin,
    end,
    rows,
    addresses,
    strides,
    like,
    writes,
    slots,
    table,
    positions,
    runs,
    starts,
    half,
    raw,
    raw16,
    storing,
    reading,
    restoring,
    sizes,
    midpoints,
    window,
    soft_cap,
    q,
    terms,
    m_i,
    l_i,
    values,
):
    """Parts begin .. end - 1 of step `number` of the module's docstring, or of all of them if it is 0.

    A part is a (token, KV head), in step 2 a (run, KV head). rows: (tokens,) of the tensors. addresses, strides: of
    queries, keys, values, outputs. storing: of `operands.join`, places of `store_tile`, where raw vectors begin.
    starts: (tokens + 1,) the first run of every token. The rest as in `attend_run`.
    """
    heads = q.shape[1]
    for part in range(begin, end):
        head = part % heads
        if number < 2:
            _begin(
                part, part + 1, rows, addresses, strides, like, writes, slots, raw, raw16, storing, reading, q, terms
            )
        first, after = part // heads, part // heads + 1
        if number == 0:
            first, after = starts[part // heads], starts[part // heads + 1]
        elif number != 2:
            after = first
        for run in range(first, after):
            token = runs[run, 0]
            attend_run(
                q[token, head],
                terms[token, head],
                raw,
                raw16,
                half,
                table[token],
                positions[token],
                runs[run, 1],
                runs[run, 2],
                head,
                sizes,
                midpoints,
                window,
                soft_cap,
                m_i[run, head],
                l_i[run, head],
                values[run, head],
            )
        if number == 0 or number == 3:
            _finish(part, part + 1, rows, addresses[3], strides[3], like, starts, m_i, l_i, values, restoring)
