"""Arms on a GPU: our formats through our Triton kernels, launched as the attention backend launches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fraqtl_bench.kernels.arms import Arm, Prepared, UnavailableError
from fraqtl_bench.kernels.packed import sample_constants, stored_values
from fraqtl_bench.kernels.shapes import Inputs, Shape
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import FORMATS, KVFormat
from fraqtl_kernels.pages import PageLayout


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
        from fraqtl_kernels.gpu.config import has_kernels
        from fraqtl_kernels.gpu.decode import decode, plan_decode
        from fraqtl_kernels.gpu.operands import LayerOperands
        from fraqtl_kernels.gpu.write import write

        if not has_kernels(self.format):
            raise UnavailableError("this format has no GPU kernels yet")
        shape, device = inputs.shape, inputs.query.device
        layout = PageLayout(self.format, shape.head_size, inputs.block_size)
        width = self.format.bytes_per_token(shape.head_size)
        pool = torch.zeros(inputs.blocks, shape.kv_heads, inputs.block_size, width, dtype=torch.uint8, device=device)
        constants = self.constants(shape)
        operands = LayerOperands.of(self.format, shape.head_size, inputs.query.dtype, device, constants)
        slots = [inputs.slots(r) for r in range(shape.batch)]

        def write_all() -> None:
            for key, value, own in zip(inputs.key, inputs.value, slots, strict=True):
                write(pool, layout, key, value, own, operands)

        write_all()
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        plan = plan_decode(
            layout,
            requests=shape.batch,
            queries=1,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            max_seq_len=shape.context,
            num_sms=num_sms,
        )
        scratch = torch.empty(plan.scratch_floats(shape.head_size), device=device)
        query_start = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
        seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
        output = torch.empty_like(inputs.query)

        def call() -> None:
            decode(
                inputs.query,
                pool,
                layout,
                inputs.order,
                query_start,
                seq_lens,
                output,
                plan,
                operands,
                scratch,
                scale=inputs.scale,
            )

        return Prepared(
            call,
            output,
            shape.bytes_read(width),
            lambda: stored_values(pool, layout, inputs, constants),
            write=write_all,
        )


def cuda_arms() -> Iterator[Arm]:
    yield from (PackedOnGpu(format) for format in FORMATS.values())
