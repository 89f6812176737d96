"""A decode step of one layer in one compiled call: store the new keys and values, attend, write the outputs.

For the requests of a batch that have one new token. The same functions as in `encode.py` and `decode.py` do the
work; here is what PyTorch does around them for other batches, and what a layer of a small model spends more time on
than on its arithmetic. Tensors come as addresses, which cost nothing to hand over.

    1. of every (token, KV head): key and value into their page, queries into the basis of the stored keys
    2. of every (run of blocks, KV head): attention, see `decode.py`
    3. of every (token, KV head): the runs joined, out of the basis of the stored values
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numba import get_num_threads, njit
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.cpu.codes import FAST, half_table
from fraqtl_kernels.cpu.decode import attend_run, grid_midpoints, page_sizes, pool_bytes, split_runs
from fraqtl_kernels.cpu.encode import make_spaces, store_tile
from fraqtl_kernels.cpu.kernels.tensors import prepare_query, row_at
from fraqtl_kernels.cpu.layers.bits import bits_of, from_float
from fraqtl_kernels.cpu.operands import StreamOperands, join
from fraqtl_kernels.cpu.products import ROWS, multiply
from fraqtl_kernels.cpu.queries import output_operands, query_operands
from fraqtl_kernels.cpu.share import share
from fraqtl_kernels.formats import DEFAULT_FORMAT, KVFormat, get_format
from fraqtl_kernels.pages import PageLayout


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
def _run(
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


def _run_all(tokens: int, runs: int, heads: int, arguments: tuple[Any, ...]) -> None:
    """All steps, on as many threads as Numba has where that pays."""
    threads, items, work = get_num_threads(), tokens * heads, runs * heads
    if threads == 1 or work < 2:
        _run(0, 0, items, *arguments)
    elif items >= threads:
        share(lambda begin, end: _run(0, begin, end, *arguments), items)
    else:
        _run(1, 0, items, *arguments)
        share(lambda begin, end: _run(2, begin, end, *arguments), work)
        _run(3, 0, items, *arguments)


@dataclass
class StepPlan:
    """What all layers of a KV-cache group share in one step, of its requests with one new token each.

    seq_lens: (requests,) int, the new token included. block_table: (requests, blocks) int32. slot_mapping: (tokens,)
    int, of the whole batch. rows: (requests,) int64, where in the batch the new tokens stand; by default one after
    another.
    """

    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    token_rows: Tensor | None = None
    _runs: dict[tuple[int, int, int], tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = torch.arange(len(self.seq_lens)) if self.token_rows is None else self.token_rows
        self.rows = rows.numpy()
        self.positions = (self.seq_lens.long() - 1)[:, None].numpy()
        self.table = self.block_table.int().contiguous().numpy()
        self.slots = self.slot_mapping.long().contiguous().numpy()

    @cached_property
    def other_slots(self) -> Tensor:
        """The slot mapping of the tokens that other requests have in the batch; -1 for those of this plan."""
        slots = self.slot_mapping.clone()
        slots[torch.from_numpy(self.rows)] = -1
        return slots

    def runs(self, block_size: int, heads: int, window: int) -> tuple[Any, Any]:
        """(runs, 3), see `split_runs`, and (requests + 1,) the first run of each request."""
        key = (block_size, heads, window)
        if key not in self._runs:
            runs = split_runs(torch.from_numpy(self.positions), block_size, heads, window or None).numpy()
            starts = np.searchsorted(runs[:, 0], np.arange(len(self.positions) + 1))
            self._runs[key] = runs, starts
        return self._runs[key]


class DecodeStep:
    """One layer, ready for decode steps.

    pool: as for `write`, dtype: of the model. constants: of the layer. scale: of the softmax.
    """

    @staticmethod
    def supports(format: KVFormat, dtype: torch.dtype) -> bool:
        """Whether vectors come with scales of their own, or are stored just as they come."""
        return all(x.is_scaled or x.raw_dtype == dtype for x in (format.k, format.v))

    def __init__(
        self,
        pool: Tensor,
        layout: PageLayout,
        dtype: torch.dtype,
        constants: LayerConstants,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        k, v = layout.format.k, layout.format.v
        heads, size = pool.shape[1], layout.head_size
        self.pool, self.constants = pool, constants
        self._shape = heads, size
        self._block_size, self._window = layout.block_size, window or 0
        raw = pool_bytes(pool)
        unit = torch.empty(1, heads, size, dtype=dtype)
        streams = (
            StreamOperands.of(unit, k, 0, layout.k_scale_offset, constants, "key", None),
            StreamOperands.of(unit, v, layout.v_offset, layout.v_scale_offset, constants, "value", None),
        )
        *arrays, self._whole, numbers = join(*streams)
        places = (layout.block_size, pool.stride(0), pool.stride(1), heads, size)
        self._storing = (*arrays, self._whole, numbers, places, (0, layout.v_offset))
        self._pages: tuple[Any, ...] = (half_table(), raw, raw.view(np.uint16))
        self._reading: tuple[Any, ...] = (
            (*query_operands(heads, size, k, constants)[:3], np.float32(scale)),
            output_operands(heads, size, v, constants),
            page_sizes(pool, layout, with_residual=True),
            grid_midpoints(layout),
            self._window,
            np.float32(soft_cap or 0),
        )
        self._dtype = dtype
        self._like = bits_of(torch.zeros(1, dtype=dtype))

    def _storing_of(self, key: Tensor, value: Tensor) -> tuple[Any, ...]:
        """`storing` of `_run` for these tensors."""
        arrays, (_, numbers, places, raw_at) = self._storing[:3], self._storing[3:]
        whole = self._whole.copy()
        for stream, x in enumerate((key, value)):
            each = x.element_size()
            whole[stream, 0], whole[stream, 2], whole[stream, 3] = x.data_ptr(), x.stride(0) * each, x.stride(1) * each
        return (*arrays, whole, numbers, places, raw_at)

    def takes(self, query: Tensor, key: Tensor | None, value: Tensor | None, output: Tensor) -> bool:
        """Whether these are in the dtype of the model and a token's numbers lie side by side, as a call wants it."""
        size = self._shape[1]
        given = (x for x in (query, key, value, output) if x is not None)
        return all(x.stride(2) == 1 and x.stride(1) == size and x.dtype == self._dtype for x in given)

    def __call__(self, query: Tensor, key: Tensor | None, value: Tensor | None, output: Tensor, plan: StepPlan) -> None:
        """query, output: (>= tokens, query heads, D). key, value: (>= tokens, KV heads, D), or None: already stored.

        Writes the first `tokens` rows of output. For tensors that it `takes`.
        """
        heads, size = self._shape
        count = len(plan.positions)
        writes = key is not None and value is not None
        k, v = (key, value) if key is not None and value is not None else (query, query)
        tensors = (query, k, v, output)
        runs, starts = plan.runs(self._block_size, heads, self._window)
        group = query.shape[1] // heads
        values = np.empty((len(runs), heads, group, size), np.float32)
        arguments = (
            plan.rows,
            tuple(x.data_ptr() for x in tensors),
            tuple(x.stride(0) for x in tensors),
            self._like,
            writes,
            plan.slots,
            plan.table,
            plan.positions,
            runs,
            starts,
            *self._pages,
            self._storing_of(k, v),
            *self._reading,
            np.empty((count, heads, group, size), np.float32),
            np.empty((count, heads, 3, group), np.float32),
            np.empty(values.shape[:3], np.float32),
            np.empty(values.shape[:3], np.float32),
            values,
        )
        _run_all(count, len(runs), heads, arguments)


def warm_up_step(dtype: torch.dtype = torch.bfloat16) -> None:
    """As `warm_up_decode`, for a model in `dtype`."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    x = torch.zeros(1, 1, 64, dtype=dtype)
    plan = StepPlan(torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), -1))
    DecodeStep(pool, layout, x.dtype, IDENTITY, scale=1.0, window=None, soft_cap=None)(x, x, x, x.clone(), plan)
