"""Arms on a GPU: our formats through our Triton kernels, launched as the attention backend launches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fraqtl_bench.kernels.arms import Arm, Prepared, UnavailableError
from fraqtl_bench.kernels.packed import sample_constants, stored_values
from fraqtl_bench.kernels.shapes import Inputs, Shape
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import FORMATS, KVFormat
from fraqtl_kernels.pages import PageLayout

if TYPE_CHECKING:  # at run time only where Triton is
    from fraqtl_kernels.gpu.operands import LayerOperands
    from fraqtl_kernels.gpu.tuning import Tuning


@dataclass(frozen=True)
class Pages:
    """One set of inputs in shuffled pages of a format, which several launch shapes can read."""

    inputs: Inputs
    layout: PageLayout
    pool: Tensor
    constants: LayerConstants
    operands: LayerOperands
    slots: list[Tensor]

    @classmethod
    def store(cls, format: KVFormat, inputs: Inputs, constants: LayerConstants) -> Pages:
        """Raises UnavailableError if no kernel takes the format."""
        from fraqtl_kernels.gpu.constexprs import has_kernels
        from fraqtl_kernels.gpu.operands import LayerOperands

        if not has_kernels(format):
            raise UnavailableError("this format has no GPU kernels yet")
        shape, device = inputs.shape, inputs.query.device
        width = format.bytes_per_token(shape.head_size)
        pages = cls(
            inputs,
            PageLayout(format, shape.head_size, inputs.block_size),
            torch.zeros(inputs.blocks, shape.kv_heads, inputs.block_size, width, dtype=torch.uint8, device=device),
            constants,
            LayerOperands.of(format, shape.head_size, inputs.query.dtype, device, constants),
            [inputs.slots(request) for request in range(shape.batch)],
        )
        pages.write()
        return pages

    def write(self) -> None:
        from fraqtl_kernels.gpu.write import write

        for key, value, own in zip(self.inputs.key, self.inputs.value, self.slots, strict=True):
            write(self.pool, self.layout, key, value, own, self.operands)

    def prepare(self, tuning: Tuning | None = None) -> Prepared:
        """Attention with a launch shape, None: the one that the launcher chooses."""
        from fraqtl_kernels.gpu.decode import decode
        from fraqtl_kernels.gpu.plan import plan_decode

        inputs, shape, device = self.inputs, self.inputs.shape, self.inputs.query.device
        plan = plan_decode(
            self.layout,
            requests=shape.batch,
            queries=1,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            max_seq_len=shape.context,
            num_sms=multiprocessors(device),
            tuning=tuning,
        )
        scratch = torch.empty(plan.scratch_floats(shape.head_size), device=device)
        query_start = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
        seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
        output = torch.empty_like(inputs.query)
        batch = (inputs.query, self.pool, self.layout, inputs.order, query_start, seq_lens, output)

        def call() -> None:
            decode(*batch, plan, self.operands, scratch, scale=inputs.scale)

        return Prepared(
            call,
            output,
            shape.bytes_read(self.layout.format.bytes_per_token(shape.head_size)),
            lambda: stored_values(self.pool, self.layout, inputs, self.constants),
            write=self.write,
        )


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@dataclass(frozen=True)
class PackedOnGpu:
    """Our decode over pages of a format, in shuffled blocks."""

    format: KVFormat
    foreign: bool = False

    @property
    def name(self) -> str:
        return self.format.name

    def constants(self, shape: Shape) -> LayerConstants:
        return sample_constants(self.format, shape.head_size, shape.kv_heads, shape.query_heads)

    def prepare(self, inputs: Inputs) -> Prepared:
        return Pages.store(self.format, inputs, self.constants(inputs.shape)).prepare()


def cuda_arms() -> Iterator[Arm]:
    yield from (PackedOnGpu(format) for format in FORMATS.values())
