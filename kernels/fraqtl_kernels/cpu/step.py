"""A decode step of one layer in one compiled call: store the new keys and values, attend, write the outputs.

For the requests of a batch that have one new token. The same functions as for `write` and `decode` do the
work; here is what PyTorch does around them for other batches, and what a layer of a small model spends more time on
than on its arithmetic. Tensors come as addresses, which cost nothing to hand over.

    1. of every (token, KV head): key and value into their page, queries into the basis of the stored keys
    2. of every (run of blocks, KV head): attention, see `kernels/decode.py`
    3. of every (token, KV head): the runs joined, out of the basis of the stored values
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import get_num_threads
from torch import Tensor

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.cpu.kernels.codes import half_table
from fraqtl_kernels.cpu.kernels.step import run_step
from fraqtl_kernels.cpu.layers.bits import bits_of
from fraqtl_kernels.cpu.operands import StreamOperands, join
from fraqtl_kernels.cpu.pages import grid_midpoints, page_sizes, pool_bytes
from fraqtl_kernels.cpu.plan import StepPlan
from fraqtl_kernels.cpu.queries import output_operands, query_operands
from fraqtl_kernels.cpu.share import share
from fraqtl_kernels.formats import DEFAULT_FORMAT, KVFormat, get_format
from fraqtl_kernels.pages import PageLayout


def _run_all(tokens: int, runs: int, heads: int, arguments: tuple[Any, ...]) -> None:
    """All steps, on as many threads as Numba has where that pays."""
    threads, items, work = get_num_threads(), tokens * heads, runs * heads
    if threads == 1 or work < 2:
        run_step(0, 0, items, *arguments)
    elif items >= threads:
        share(lambda begin, end: run_step(0, begin, end, *arguments), items)
    else:
        run_step(1, 0, items, *arguments)
        share(lambda begin, end: run_step(2, begin, end, *arguments), work)
        run_step(3, 0, items, *arguments)


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
