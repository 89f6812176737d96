"""Kernels for machines without a GPU: `write` into packed pages, `attend` over them."""

# ruff: noqa: E402 (Numba must have a cache folder before the first kernel is decorated)

from fraqtl_kernels.numba_cache import kernel_cache

kernel_cache()

from fraqtl_kernels.cpu.attention import AttentionPlan, attend, plan_attention
from fraqtl_kernels.cpu.decode import warm_up_decode
from fraqtl_kernels.cpu.nearest import warm_up_nearest
from fraqtl_kernels.cpu.refinements import Refinements
from fraqtl_kernels.cpu.step import DecodeStep, StepPlan, warm_up_step
from fraqtl_kernels.cpu.write import warm_up_write, write

__all__ = ["AttentionPlan", "DecodeStep", "Refinements", "StepPlan", "attend", "plan_attention", "warm_up", "write"]


def warm_up() -> None:
    """Compile the kernels, or load them from Numba's cache on disk, so that no request has to wait for them."""
    warm_up_decode()
    warm_up_nearest()
    warm_up_write()
    warm_up_step()
