"""Versions without Triton of the kernels that carry states of hybrid models from block to block.

With a prefix cache a state moves on to a new block at the end of each, and what it was at that end stays behind. With
drafts it does so before a step, for what the last one accepted, and after a step that accepted tokens beyond the end
of a block.

A recurrence has a state a block, after each draft in a block of its own: from the block `bias` columns on. A
convolution has the last tokens in one block: `bias` of them are dropped in front. Arguments are those of vLLM's
kernels, in their order; addresses and sizes are in bytes where vLLM's are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


def copy_states(sources: Tensor, targets: Tensor, sizes: Tensor, **_: Any) -> None:
    """Bytes from address to address. (copies,) integers each."""
    for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(target, source, size)


class States(NamedTuple):
    """Where states lie. (states,) integers each, but for the block tables: (groups,) addresses of int32 rows.

    widths: tokens that a convolution keeps; 0: a recurrence. row_counts, row_strides: of convolutions whose channels
    come first.
    """

    tables: Tensor
    table_stride: int
    bases: Tensor
    block_strides: Tensor
    element_sizes: Tensor
    inner_sizes: Tensor
    widths: Tensor
    groups: Tensor
    row_counts: Tensor
    row_strides: Tensor

    def carry(self, request: int, source: int, target: int, bias: int, channels_first: bool) -> None:
        """All states of a request from one column of its block tables to another."""
        for n in range(len(self.bases)):
            width, element, inner = int(self.widths[n]), int(self.element_sizes[n]), int(self.inner_sizes[n])
            to = self._address(n, request, target)
            if not width:
                ctypes.memmove(to, self._address(n, request, source + bias), inner * element)
                continue
            start, size = self._address(n, request, source) + bias * inner * element, (width - bias) * inner * element
            rows, stride = (int(self.row_counts[n]), int(self.row_strides[n])) if channels_first else (1, 0)
            for row in range(rows):
                ctypes.memmove(to + row * stride, start + row * stride, size)

    def _address(self, n: int, request: int, column: int) -> int:
        entry = int(self.tables[self.groups[n]]) + 4 * (request * self.table_stride + column)
        return int(self.bases[n]) + ctypes.c_int32.from_address(entry).value * int(self.block_strides[n])


def carry_before_step(targets: Tensor, sources: Tensor, biases: Tensor, *rest: Any, **options: Any) -> None:
    """To the block that a step begins in. (requests,) columns of block tables each; a source below 0: no state yet."""
    *states, _, count = rest
    for request in range(count):
        source, target = int(sources[request]), int(targets[request])
        if source >= 0 and source != target:
            States(*states).carry(request, source, target, int(biases[request]), options["CONV_STATE_DIM_FIRST"])


def keep_after_step(
    accepted: Tensor, columns: Tensor, scheduled: Tensor, computed: Tensor, drafted: Tensor, *rest: Any, **options: Any
) -> None:
    """To the last block that a step filled, what the state was at its end. (requests,) numbers of tokens each.

    accepted: with the step's own token. columns: where the step's states are. computed: before the step. The last of
    `rest` but for two is (requests,) <- 1 where the state that the next step begins with has moved to the front.
    """
    *states, kept, _, count = rest
    block = options["block_size"]
    for request in range(count):
        certain = int(computed[request] + scheduled[request] - drafted[request])
        end = (certain + int(accepted[request]) - 1) // block * block
        if end < certain:
            continue
        source, target = int(columns[request]), end // block - 1
        if source == target:
            kept[request] = 1
        if source != target or end != certain:
            States(*states).carry(request, source, target, end - certain, options["CONV_STATE_DIM_FIRST"])


STATE_KERNELS: dict[str, Callable[..., None]] = {
    "vllm.v1.worker.mamba_utils.batch_memcpy_kernel": copy_states,
    "vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel": carry_before_step,
    "vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel": keep_after_step,
}
"""By vLLM's name."""
STATE_MODULES = ("vllm.v1.worker.mamba_utils",)
