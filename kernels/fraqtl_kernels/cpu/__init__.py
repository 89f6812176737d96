"""Kernels for machines without a GPU: `write` into packed pages, `attend` over them."""

from fraqtl_kernels.cpu.attention import AttentionPlan, attend, plan_attention
from fraqtl_kernels.cpu.decode import warm_up_decode
from fraqtl_kernels.cpu.nearest import warm_up_nearest
from fraqtl_kernels.cpu.refinements import Refinements
from fraqtl_kernels.cpu.write import warm_up_write, write

WARM_UPS = (warm_up_decode, warm_up_write, warm_up_nearest)  # they share nothing: one may compile beside another

__all__ = ["WARM_UPS", "AttentionPlan", "Refinements", "attend", "plan_attention", "warm_up", "write"]


def warm_up() -> None:
    """Compile the kernels, or load them from Numba's cache on disk, so that no request has to wait for them."""
    for part in WARM_UPS:
        part()
