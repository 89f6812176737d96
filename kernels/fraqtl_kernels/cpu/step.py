"""A decode step of one layer in one compiled call: store the new keys and values, attend, write the outputs.

For the requests of a batch that have one new token. The same functions as for `write` and `decode` do the
work; here is what PyTorch does around them for other batches, and what a layer of a small model spends more time on
than on its arithmetic. Tensors come as addresses, which cost nothing to hand over.

    1. of every (token, KV head): key and value into their page, queries into the basis of the stored keys
    2. of every (run of blocks, KV head): attention, see `kernels/decode.py`
    3. of every (token, KV head): the runs joined, out of the basis of the stored values
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fraqtl_kernels.cpu.kernels.step import Layer, Paging, Tensors, Work, run_parts, run_step
from fraqtl_kernels.cpu.kernels.team import address_of
from fraqtl_kernels.cpu.layers.bits import bits_of
from fraqtl_kernels.cpu.operands import LayerOperands
from fraqtl_kernels.cpu.pages import Pool
from fraqtl_kernels.cpu.plan import Softmax, StepPlan
from fraqtl_kernels.cpu.share import team_size
from fraqtl_kernels.cpu.write import batch_of
from fraqtl_kernels.formats import DEFAULT_FORMAT, KVFormat, get_format
from fraqtl_kernels.pages import PageLayout

EVEN = 1.25  # times the shortest time: longer than that, and a step's parts are shared out anew


def _at_once(tokens: int, runs: int, heads: int, threads: int) -> bool:
    """Whether all threads have work to the end if each goes through the steps of its own parts."""
    parts = tokens * heads
    most = -(-parts // threads) * threads
    return runs == tokens or most <= EVEN * parts


class DecodeStep:
    """One layer, ready for decode steps.

    pool, operands: as for `write`. dtype: of the model.
    """

    @staticmethod
    def supports(format: KVFormat, dtype: torch.dtype) -> bool:
        """Whether vectors come with scales of their own, or are stored just as they come."""
        return all(x.is_scaled or x.raw_dtype == dtype for x in (format.k, format.v))

    def __init__(
        self, pool: Tensor, layout: PageLayout, dtype: torch.dtype, operands: LayerOperands, softmax: Softmax
    ) -> None:
        self.pool, self.operands = pool, operands
        self._shape = pool.shape[1], layout.head_size
        self._block_size, self._window = layout.block_size, softmax.window or 0
        self._pages = Pool.of(pool, layout, with_residual=True)
        limits = np.float32(softmax.scale), *softmax.limits, softmax.sinks(pool.shape[1])
        self._layer = Layer(operands.to_basis, operands.from_basis, *limits)
        self._address: int | None = None
        self._dtype = dtype
        self._like = bits_of(torch.zeros(1, dtype=dtype))

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
        count, group = len(plan.positions), query.shape[1] // heads
        k, v = (query, query) if key is None or value is None else (key, value)
        x = (query, k, v, output)
        addresses, strides = tuple(t.data_ptr() for t in x), tuple(t.stride(0) for t in x)
        tensors = Tensors(plan.rows, addresses, strides, self._like, key is not None and value is not None)
        runs, starts = plan.runs(self._block_size, heads, self._window)
        paging = Paging(plan.slots, plan.table, plan.positions, runs, starts)
        values = np.empty((len(runs), heads, group, size), np.float32)
        work = Work(
            np.empty((count, heads, group, size), np.float32),
            np.empty((count, heads, 3, group), np.float32),
            np.empty(values.shape[:3], np.float32),
            np.empty(values.shape[:3], np.float32),
            values,
        )
        arguments = tensors, paging, self._pages, batch_of(self.operands, k, v, None), self._layer, work
        if self._address is None:
            self._address = address_of(run_parts, 0, *arguments)
        threads = team_size(len(runs) * heads)
        run_step(self._address, threads, _at_once(count, len(runs), heads, threads), *arguments)


def warm_up_step(dtype: torch.dtype = torch.bfloat16) -> None:
    """As `warm_up_decode`, for a model in `dtype`."""
    layout = PageLayout(get_format(DEFAULT_FORMAT), 64, 16)
    pool = torch.zeros(1, 1, 16, layout.page_bytes // 16, dtype=torch.uint8)
    x = torch.zeros(1, 1, 64, dtype=dtype)
    plan = StepPlan(torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), -1))
    step = DecodeStep(pool, layout, x.dtype, LayerOperands.of(layout, 1), Softmax(1.0))
    step(x, x, x, x.clone(), plan)
