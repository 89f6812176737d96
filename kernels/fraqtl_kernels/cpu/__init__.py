"""Kernels for machines without a GPU: `write` into packed pages, `attend` over them."""

# ruff: noqa: E402 (Numba must have a cache folder before the first kernel is decorated)

from fraqtl_kernels.numba_cache import kernel_cache

kernel_cache()

import torch

from fraqtl_kernels.cpu.attention import attend
from fraqtl_kernels.cpu.decode import warm_up_decode
from fraqtl_kernels.cpu.layers.warm_up import warm_up_layers
from fraqtl_kernels.cpu.operands import LayerOperands
from fraqtl_kernels.cpu.plan import AttentionPlan, Softmax, StepPlan, plan_attention
from fraqtl_kernels.cpu.prefill import warm_up_prefill
from fraqtl_kernels.cpu.residual import Residuals
from fraqtl_kernels.cpu.step import DecodeStep, warm_up_step
from fraqtl_kernels.cpu.write import warm_up_write, write
from fraqtl_kernels.formats import KVFormat

# What a bfloat16 model in the default format needs. They share nothing: one may compile beside another.
WARM_UPS = (warm_up_step, warm_up_write, warm_up_layers, warm_up_prefill)

__all__ = [
    "WARM_UPS",
    "AttentionPlan",
    "DecodeStep",
    "LayerOperands",
    "Residuals",
    "Softmax",
    "StepPlan",
    "attend",
    "plan_attention",
    "warm_up",
    "write",
]


def warm_up(format: KVFormat, dtype: torch.dtype) -> None:
    """Compile the kernels, or load them from Numba's cache on disk, so that no request has to wait for them.

    dtype: of the model.
    """
    if DecodeStep.supports(format, dtype):
        warm_up_step(dtype)
    else:
        warm_up_decode()
    warm_up_write()
    warm_up_layers(dtype)
    warm_up_prefill(dtype)
