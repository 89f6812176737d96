"""The CPU kernels as tests call them: from a layer's constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels import cpu
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.pages import PageLayout


def cpu_write(
    pool: Tensor, layout: PageLayout, key: Tensor, value: Tensor, slots: Tensor, constants: LayerConstants = IDENTITY
) -> cpu.Residuals | None:
    operands = cpu.LayerOperands.of(layout, pool.shape[1], constants)
    return cpu.write(pool, layout, key, value, slots, operands)


def cpu_attend(
    query: Tensor,
    pool: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    plan: cpu.AttentionPlan,
    output: Tensor,
    *,
    constants: LayerConstants = IDENTITY,
    **options: Any,
) -> None:
    operands = cpu.LayerOperands.of(layout, pool.shape[1], constants)
    cpu.attend(query, pool, layout, block_table, plan, output, operands, **options)


def decode_step(
    pool: Tensor,
    layout: PageLayout,
    dtype: torch.dtype,
    constants: LayerConstants,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sink_logits: Tensor | None = None,
) -> cpu.DecodeStep:
    operands = cpu.LayerOperands.of(layout, pool.shape[1], constants)
    return cpu.DecodeStep(pool, layout, dtype, operands, cpu.Softmax(scale, window, soft_cap, sink_logits))
