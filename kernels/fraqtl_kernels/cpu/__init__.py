"""Kernels for machines without a GPU: `write` into packed pages, `attend` over them."""

from fraqtl_kernels.cpu.attention import AttentionPlan, attend, plan_attention
from fraqtl_kernels.cpu.decode import warm_up
from fraqtl_kernels.cpu.write import write

__all__ = ["AttentionPlan", "attend", "plan_attention", "warm_up", "write"]
