"""Torch versions of native operators, against transformers, plain formulas, and vLLM's own code that calls them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from vllm.platforms import current_platform

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.platform import experts, native_ops
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

SIZES = {"tokens": 45, "hidden": 64, "inner": 96, "experts": 6}


def activated(activation: str, x: Tensor) -> Tensor:
    """transformers' own."""
    if activation == "swigluoai":
        limits: Any = SimpleNamespace(alpha=1.702, limit=7.0)
        return GptOssExperts._apply_gate(limits, x)
    gate, up = x.chunk(2, dim=-1)
    return ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)](gate) * up


def every_expert(
    x: Tensor, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None, mix: Tensor, activation: str
) -> Tensor:
    """All experts for all tokens in float64, weighed by `mix` (tokens, experts)."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for e in range(len(w13)):
        up = x.double() @ w13[e].double().T + (0 if b13 is None else b13[e].double())
        down = activated(activation, up) @ w2[e].double().T + (0 if b2 is None else b2[e].double())
        total += mix[:, e, None].double() * down
    return total


def routed(k: int) -> tuple[Tensor, Tensor]:
    """Weights and experts (tokens, k); the last expert gets no token."""
    tokens, experts = SIZES["tokens"], SIZES["experts"]
    return torch.rand(tokens, k), torch.stack([torch.randperm(experts - 1)[:k] for _ in range(tokens)])


def mixed(weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(len(chosen), SIZES["experts"]).scatter(1, chosen, weights)


@ours_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", experts.ACTIVATIONS)
@pytest.mark.parametrize(("with_bias", "skip_weighted"), [(False, False), (True, False), (False, True)])
def test_experts(activation: str, with_bias: bool, skip_weighted: bool, dtype: torch.dtype) -> None:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    CpuWithoutNativeOps.import_kernels()
    torch.manual_seed(1)
    tokens, hidden, inner, count = SIZES.values()
    x, out = torch.randn(tokens, hidden).to(dtype), torch.full((tokens, hidden), float("nan"), dtype=dtype)
    w13, w2 = (torch.randn(count, 2 * inner, hidden) / 2).to(dtype), (torch.randn(count, hidden, inner) / 7).to(dtype)
    b13, b2 = (torch.randn(count, n).to(dtype) if with_bias else None for n in (2 * inner, hidden))
    weights, chosen = routed(1 if skip_weighted else 3)
    mix = mixed(torch.ones_like(weights) if skip_weighted else weights, chosen)
    packed = [cpu_prepack_moe_weight(w, "vec") for w in (w13, w2)]
    cpu_fused_moe(out, x, *packed, b13, b2, weights, chosen.int(), activation, "vec", skip_weighted)
    expected = every_expert(x, w13, w2, b13, b2, mix, activation)
    close = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype] * expected.abs().max()
    assert (out.double() - expected).abs().max() < close


@ours_only
@pytest.mark.parametrize("rows", [1, 45])
def test_mxfp4_experts(rows: int) -> None:
    from vllm._custom_ops import CPUQuantMethod, fused_experts_cpu
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_mxfp4_moe_layer_for_cpu

    CpuWithoutNativeOps.import_kernels()
    torch.manual_seed(2)
    _, hidden, inner, count = SIZES.values()
    shapes = (count, 2 * inner, hidden), (count, hidden, inner)
    codes = [torch.randint(0, 256, (*shape[:2], shape[2] // 2)).byte() for shape in shapes]
    scales = [torch.randint(120, 126, (*shape[:2], shape[2] // 32)).byte() for shape in shapes]
    w13, w2 = (
        convert_moe_packed_tensors(code.unflatten(-1, (-1, 16)), scale).transpose(1, 2)
        for code, scale in zip(codes, scales, strict=True)
    )
    b13, b2 = torch.randn(count, 2 * inner), torch.randn(count, hidden)
    weights, chosen = (part[:rows] for part in routed(3))
    x = torch.randn(rows, hidden).bfloat16()
    packed = prepare_mxfp4_moe_layer_for_cpu(*codes, *scales)
    out, method = torch.full_like(x, float("nan")), CPUQuantMethod.MXFP4
    fused_experts_cpu(
        out, x, *packed[:2], weights, chosen.int(), method, *packed[2:], None, None, None, b13, b2, 1.702, 7.0, True
    )
    expected = every_expert(x, w13, w2, b13, b2, mixed(weights, chosen), "swigluoai")
    assert (out.double() - expected).abs().max() < 1e-2 * expected.abs().max()


def test_activations_and_weights_of_experts_that_are_not_there_are_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(
        UnsupportedError, match=r"^experts with activation relu2 need vLLM's CPU build: .* choose silu, "
    ):
        native_ops.fused_experts(x, x, x, x, None, None, x, x, False, "relu2", "vec")
    others = x, x, None, None, None, None, None, None, None, None, True, 0
    with pytest.raises(UnsupportedError, match=r"^experts with quantized weights need vLLM's CPU build"):
        native_ops.fused_quantized_experts(x, x, x, x, x, x, 2, *others)


def test_gelu_of_torch_is_the_formula() -> None:
    """So that the operators may be torch's own."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(F.gelu(x, approximate="tanh"), ACT2FN["gelu_new"](x))
