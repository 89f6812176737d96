"""vLLM's layers on a CPU, with compiled versions of what its stock wheel runs as many small operators.

Layers are exchanged after the weights are loaded, one by one, where ours computes the same: a layer whose class
has a `forward_native` of its own keeps it. Linear layers go through `cpu_linear`, which vLLM calls for unquantized
weights on a CPU; the others through `_forward_method`, which `CustomOp.forward` calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from fraqtl_kernels.cpu.layers.bits import DTYPES
from fraqtl_kernels.cpu.layers.gate import GELU_TANH, SILU, gate
from fraqtl_kernels.cpu.layers.linear import WideLinear
from fraqtl_kernels.cpu.layers.norm import RMSNorm
from fraqtl_kernels.cpu.layers.packed import PackedLinear
from fraqtl_kernels.cpu.layers.rotary import RotaryEmbedding
from fraqtl_vllm import _vllm, hooks

HALVES = (torch.bfloat16, torch.float16)
FEW_ROWS_WITH_UNIT = 2  # so few are a matter of memory and not of arithmetic, matrix unit or not
SHARE_FOR_COPIES = 1 / 4  # of the free memory, what second copies of weights may take

logger = logging.getLogger("fraqtl_vllm")


def has_matrix_unit(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of `dtype` faster than those of float32.

    oneDNN's own cap on instruction sets (ONEDNN_MAX_CPU_ISA) counts.
    """
    if dtype == torch.bfloat16:
        unit = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return unit and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_amx_fp16_supported() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def replace_layers(model: nn.Module, *, copies: bool | None = None) -> None:
    """Exchange what can be exchanged in a model whose weights are loaded.

    copies: whether weights are kept a second time where that is faster; by default where they fit.
    """
    if copies is None:
        copies = _copies_fit(model)
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "cpu_linear"):
            if (linear := _linear(layer, copies=copies)) is not None:
                hooks.LINEAR.put(layer, linear)
        elif isinstance(layer, _vllm.CustomOp) and (forward := _forward(layer)) is not None:
            hooks.FORWARD.put(layer, forward)


def _copies_fit(model: nn.Module) -> bool:
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
    copied = (x.weight for x in layers if _is_known(x.weight) and _gains_by_copy(x.weight.dtype))
    needed = sum(weight.nbytes for weight in copied)
    fit = needed <= SHARE_FOR_COPIES * psutil.virtual_memory().available
    if needed and fit:
        logger.info("Linear layers keep a second copy of their weights, %.0f MiB, for oneDNN", needed / 2**20)
    return fit


def _is_known(weight: Tensor) -> bool:
    if weight.is_meta:  # the head of a model that only pools
        return False
    return weight.dim() == 2 and weight.dtype in HALVES and weight.is_contiguous() and weight.numel() > 0


def _gains_by_copy(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and has_matrix_unit(dtype)


def _linear(layer: Any, *, copies: bool) -> Callable[..., Tensor] | None:
    weight: Tensor = layer.weight
    if not _is_known(weight):
        return None
    wide = WideLinear(weight)
    if not has_matrix_unit(weight.dtype):
        return lambda x, _weight, bias: wide(x, bias)
    plain = weight.detach()  # a parameter of vLLM's goes through `__torch_function__` first
    packed = PackedLinear(weight) if copies and _gains_by_copy(weight.dtype) else None

    def linear(x: Tensor, _weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() <= FEW_ROWS_WITH_UNIT * x.shape[-1]:
            return wide(x, bias)
        return nn.functional.linear(x, plain, bias) if packed is None else packed(x, bias)

    return linear


def _forward(layer: Any) -> Callable[..., Any] | None:
    """Our `forward` of a layer, or None. A class counts as known by whose `forward_native` it runs."""
    native = getattr(type(layer), "forward_native", None)
    if native is _vllm.RMSNorm.forward_native and layer.variance_size_override is None:
        return _norm(layer, layer.weight if layer.has_weight else None, gain=0.0, in_place=True)
    if native is _vllm.GemmaRMSNorm.forward_native:
        return _norm(layer, layer.weight, gain=1.0, in_place=False)
    if native is _vllm.SiluAndMul.forward_native:
        return lambda x: gate(x, SILU)
    if native is _vllm.GeluAndMul.forward_native and layer.approximate == "tanh":
        return lambda x: gate(x, GELU_TANH)
    if native is _vllm.RotaryEmbedding.forward_native:
        return _rotary(layer)
    return None


def _norm(layer: Any, weight: Tensor | None, *, gain: float, in_place: bool) -> Callable[..., Any] | None:
    if weight is not None and weight.dtype not in DTYPES:
        return None
    return RMSNorm(weight, layer.variance_epsilon, gain=gain, in_place=in_place)


def _rotary(layer: Any) -> Callable[..., Any] | None:
    table: Tensor = layer.cos_sin_cache
    if table.dtype not in DTYPES or not table.is_contiguous():
        return None
    ours = RotaryEmbedding(table, layer.head_size, interleaved=not layer.is_neox_style)

    def rotate(positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if positions.dim() != 1 or query.dim() != 2 or query.stride(-1) != 1 or query.dtype not in DTYPES:
            return layer.forward_native(positions, query, key)
        return ours(positions, query, key)

    return rotate
