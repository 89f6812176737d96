"""Mixtures of experts without vLLM's compiled operators: tokens are grouped by expert, then one product an expert.

In float16 and bfloat16, on processors without matrix units for them, products go through our compiled linear layers.
MXFP4 weights stay packed in memory. Activations and sums over experts are float32; what an expert's first product
gives, and what its activation gives, is rounded to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fraqtl_kernels.cpu.layers.linear import WideLinear
from fraqtl_kernels.cpu.layers.mxfp4 import MXFP4Linear
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.platform.cpu_layers import FEW_ROWS_WITH_UNIT, HALVES, has_matrix_unit

MXFP4 = 4
"""vLLM's number of that kind of weights, in its `CPUQuantMethod`."""
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Of gpt-oss, and constants in vLLM's own operator for unquantized experts."""

Activation = Callable[[Tensor], Tensor]


def _gated(activation: Activation) -> Activation:
    """act(gate) · up, with gate in the first half of the last axis and up in the second."""

    def run(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return run


def clamped_swiglu(x: Tensor, *, alpha: float, limit: float) -> Tensor:
    """gate · sigmoid(alpha · gate) · (up + 1), clamped to the limit; gate and up take turns in the last axis."""
    gate = x[..., ::2].clamp(max=limit)
    up = x[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


ACTIVATIONS: dict[str, Activation] = {
    "silu": _gated(F.silu),
    "gelu": _gated(F.gelu),
    "gelu_tanh": _gated(lambda x: F.gelu(x, approximate="tanh")),
    "swigluoai": partial(clamped_swiglu, alpha=SWIGLU_ALPHA, limit=SWIGLU_LIMIT),
}


def fused_experts(
    out: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    skip_weighted: bool,
    activation: str,
    isa: str,
) -> None:
    """vLLM's `cpu_fused_moe`: every token through its experts. Raises UnsupportedError.

    out, x: (tokens, hidden). w13: (experts, 2 · inner, hidden), w2: (experts, hidden, inner), their biases without
    the last axis. weights, experts: (tokens, k). skip_weighted: the router's weights are in `x` already.
    """
    if activation not in ACTIVATIONS:
        valid = ", ".join(ACTIVATIONS)
        raise UnsupportedError(f"experts with activation {activation} need vLLM's CPU build: without it choose {valid}")

    def run(expert: int, rows: Tensor) -> Tensor:
        up = _product(rows, w13[expert], _of(w13_bias, expert))
        inner = ACTIVATIONS[activation](up.float()).to(x.dtype)
        return _product(inner, w2[expert], _of(w2_bias, expert))

    _mix(out, x, None if skip_weighted else weights, experts, run)


class Quantized(NamedTuple):
    """The operands of vLLM's `fused_experts_cpu`, in its order, with the shapes that MXFP4 has."""

    out: Tensor
    x: Tensor
    """Both (tokens, hidden)."""
    w13: Tensor
    """(experts, 2 · inner, hidden / 2) uint8"""
    w2: Tensor
    """(experts, hidden, inner / 2) uint8"""
    weights: Tensor
    experts: Tensor
    """Both (tokens, k)."""
    method: int
    w13_scale: Any
    """(experts, 2 · inner, hidden / 32) uint8"""
    w2_scale: Any
    """(experts, hidden, inner / 32) uint8"""
    w13_zero: Tensor | None
    w2_zero: Tensor | None
    x_scale: Tensor | None
    block_size: list[int] | None
    w13_bias: Tensor | None
    """(experts, 2 · inner)"""
    w2_bias: Tensor | None
    """(experts, hidden)"""
    alpha: float | None
    limit: float | None
    is_packed: bool
    activation: int = 0
    """Which one, where there are neither alpha nor limit. vLLM 0.32 has no such operand."""


def fused_quantized_experts(given: Quantized) -> None:
    """vLLM's `fused_experts_cpu`, for the experts of gpt-oss. Raises UnsupportedError."""
    alpha, limit = given.alpha, given.limit
    if given.method != MXFP4 or alpha is None or limit is None:
        raise UnsupportedError(
            "experts with quantized weights need vLLM's CPU build: without it choose unquantized ones, or gpt-oss"
        )

    def run(expert: int, rows: Tensor) -> Tensor:
        up = MXFP4Linear(given.w13[expert], given.w13_scale[expert])(rows, _of(given.w13_bias, expert))
        inner = clamped_swiglu(up.float(), alpha=alpha, limit=limit).to(rows.dtype)
        return MXFP4Linear(given.w2[expert], given.w2_scale[expert])(inner, _of(given.w2_bias, expert))

    _mix(given.out, given.x, given.weights, given.experts, run)


def _mix(out: Tensor, x: Tensor, weights: Tensor | None, experts: Tensor, run: Callable[[int, Tensor], Tensor]) -> None:
    """out <- the sum over a token's experts of weight · run(expert, token), in the experts' order. weights: 1 if None.

    A token's result depends on the others at most by how a product of more rows rounds.
    """
    choices = experts.shape[1]
    order = experts.flatten().argsort(stable=True)  # a number for every choice of every token
    total = torch.zeros(x.shape, dtype=torch.float32)
    counts = torch.bincount(experts.flatten()).tolist()
    for expert, chosen in enumerate(order.split(counts)):
        if len(chosen) == 0:
            continue
        rows = chosen // choices
        product = run(expert, x[rows]).float()
        total.index_add_(0, rows, product if weights is None else product * weights.flatten()[chosen, None].float())
    out.copy_(total)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, k) · weight (n, k)^T + bias (n,)."""
    is_wide = weight.dtype in HALVES and (len(x) <= FEW_ROWS_WITH_UNIT or not has_matrix_unit(weight.dtype))
    if is_wide:
        return WideLinear(weight)(x, bias)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _of(bias: Any, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
