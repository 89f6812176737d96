"""Arms on the CPU: our formats through our kernels, and torch's own attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fraqtl_bench.kernels.arms import Arm, Prepared
from fraqtl_bench.kernels.packed import stored_values
from fraqtl_bench.kernels.shapes import Inputs
from fraqtl_kernels import cpu
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.formats import FORMATS, KVFormat
from fraqtl_kernels.pages import PageLayout


@dataclass(frozen=True)
class PackedOnCpu:
    """Our decode over pages of a format, in shuffled blocks."""

    format: KVFormat
    foreign: bool = False

    @property
    def name(self) -> str:
        return self.format.name

    def prepare(self, inputs: Inputs) -> Prepared:
        shape = inputs.shape
        layout = PageLayout(self.format, shape.head_size, inputs.block_size)
        width = self.format.bytes_per_token(shape.head_size)
        pool = torch.zeros(inputs.blocks, shape.kv_heads, inputs.block_size, width, dtype=torch.uint8)
        constants = calibrate(self.format, inputs.key[0], inputs.query, inputs.value[0])
        operands = cpu.LayerOperands.of(layout, shape.kv_heads, constants)
        slots = [inputs.slots(r) for r in range(shape.batch)]

        def write() -> None:
            for key, value, own in zip(inputs.key, inputs.value, slots, strict=True):
                cpu.write(pool, layout, key, value, own, operands)

        write()
        plan = cpu.plan_attention(list(range(shape.batch + 1)), [shape.context] * shape.batch)
        output = torch.empty_like(inputs.query)

        def call() -> None:
            cpu.attend(inputs.query, pool, layout, inputs.order, plan, output, operands, scale=inputs.scale)

        return Prepared(
            call,
            output,
            shape.bytes_read(width),
            lambda: stored_values(pool, layout, inputs, constants),
            write=write,
        )


@dataclass(frozen=True)
class Sdpa:
    """torch's scaled_dot_product_attention over contiguous bfloat16 keys and values, one call for the batch."""

    name: str = "sdpa-bf16"
    foreign: bool = True

    def prepare(self, inputs: Inputs) -> Prepared:
        key, value = (x.transpose(1, 2).contiguous() for x in (inputs.key, inputs.value))
        query, output = inputs.query[:, :, None], torch.empty_like(inputs.query)

        def call() -> None:
            attend = torch.nn.functional.scaled_dot_product_attention
            output.copy_(attend(query, key, value, enable_gqa=True)[:, :, 0])

        size = inputs.shape.bytes_read(4 * inputs.shape.head_size)
        return Prepared(call, output, size, lambda: (inputs.key[0], inputs.value[0]))


def cpu_arms() -> Iterator[Arm]:
    yield Sdpa()
    yield from (PackedOnCpu(format) for format in FORMATS.values())
