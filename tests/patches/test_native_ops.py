"""Torch versions of native operators, against transformers, plain formulas, and vLLM's own code that calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from vllm.platforms import current_platform

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.platform import native_ops
from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps

ours_only = pytest.mark.skipif(
    not isinstance(current_platform, CpuWithoutNativeOps), reason="vLLM runs on another platform here"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# An operator's name, and that of the activation in transformers.
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_fast": "gelu_fast", "gelu_quick": "quick_gelu"}


def values(dtype: torch.dtype) -> Tensor:
    """Where activations bend and where they don't, both signs; not contiguous."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(8, 40, 6, generator=generator) * torch.logspace(-3, 1, 40)[:, None]).to(dtype).transpose(1, 2)


def exact(name: str, x: Tensor) -> Tensor:
    """transformers' activation in float64, rounded once."""
    found: Tensor = ACT2FN[name](x.double()).to(x.dtype)
    return found


@ours_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ACTIVATIONS)
def test_activation_is_that_of_transformers(op: str, dtype: torch.dtype) -> None:
    CpuWithoutNativeOps.import_kernels()
    x = values(dtype)
    out = torch.full_like(x, float("nan"))
    getattr(torch.ops._C, op)(out, x)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out, exact(ACTIVATIONS[op], x), rtol=tolerance, atol=tolerance / 10)


def registered_activations() -> list[str]:
    from vllm.model_executor.layers import activation

    return sorted(activation._ACTIVATION_REGISTRY._factory)


@ours_only
def test_the_list_of_activations_is_not_empty() -> None:
    assert {"gelu", "gelu_new", "gelu_fast", "quick_gelu", "silu", "relu2"} <= set(registered_activations())


@ours_only
@pytest.mark.parametrize("name", registered_activations())
def test_every_activation_that_vllm_knows_can_be_made_and_is_right(name: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import get_act_fn

    CpuWithoutNativeOps.import_kernels()
    x = values(torch.float32)
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        found = get_act_fn(name)(x)
    if name == "xielu":  # its parameters are a checkpoint's, and transformers makes it anew
        expected = ACT2FN[name].to(torch.float32)(x).detach()
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    else:
        torch.testing.assert_close(found, exact(name, x), rtol=1e-6, atol=1e-6)


# ---- linear layers of processors with AMX


@ours_only
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (8, 40)])  # vLLM packs weights of fewer than 16 rows in another way
def test_small_linear_layers_where_there_is_amx(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], with_bias: bool
) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    CpuWithoutNativeOps.import_kernels()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    torch.manual_seed(0)
    layer: Any = torch.nn.Linear(shape[1], shape[0], bias=with_bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 5, shape[1], dtype=torch.bfloat16)
    expected = layer(x)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0  # the packed one took its place, so vLLM's packing was asked for
    assert torch.equal(layer.cpu_linear(x, layer.weight, layer.bias), expected)


# ---- mixtures of experts


def every_expert(
    x: Tensor, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None, mix: Tensor, activation: str
) -> Tensor:
    """All experts for all tokens in float64, weighed by `mix` (tokens, experts)."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for e in range(len(w13)):
        up = x.double() @ w13[e].double().T + (0 if b13 is None else b13[e].double())
        gate, up = up.chunk(2, dim=-1)
        name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
        down = (ACT2FN[name](gate) * up) @ w2[e].double().T + (0 if b2 is None else b2[e].double())
        total += mix[:, e, None].double() * down
    return total


@ours_only
@pytest.mark.parametrize("activation", native_ops.EXPERT_ACTIVATIONS)
@pytest.mark.parametrize(("with_bias", "skip_weighted"), [(False, False), (True, False), (False, True)])
def test_experts(activation: str, with_bias: bool, skip_weighted: bool) -> None:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    CpuWithoutNativeOps.import_kernels()
    torch.manual_seed(1)
    tokens, hidden, inner, experts, k = 17, 32, 48, 6, 1 if skip_weighted else 3
    x, out = torch.randn(tokens, hidden), torch.full((tokens, hidden), float("nan"))
    w13, w2 = torch.randn(experts, 2 * inner, hidden) / 6, torch.randn(experts, hidden, inner) / 7
    b13, b2 = (torch.randn(experts, 2 * inner), torch.randn(experts, hidden)) if with_bias else (None, None)
    chosen = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(tokens)])  # the last one gets no token
    weights = torch.rand(tokens, k)
    mix = torch.zeros(tokens, experts).scatter(1, chosen, torch.ones_like(weights) if skip_weighted else weights)
    packed = [cpu_prepack_moe_weight(w, "vec") for w in (w13, w2)]
    cpu_fused_moe(out, x, *packed, b13, b2, weights, chosen.int(), activation, "vec", skip_weighted)
    torch.testing.assert_close(out.double(), every_expert(x, w13, w2, b13, b2, mix, activation), rtol=1e-5, atol=1e-5)


def test_an_unknown_activation_of_experts_is_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(UnsupportedError, match=r"^experts with activation swigluoai need vLLM's CPU build: .* choose "):
        native_ops.fused_experts(x, x, x, x, None, None, x, x, False, "swigluoai", "vec")


def test_gelu_of_torch_is_the_formula() -> None:
    """So that the operators may be torch's own."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(F.gelu(x, approximate="tanh"), ACT2FN["gelu_new"](x))
