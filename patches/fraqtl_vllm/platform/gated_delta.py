"""Gated delta layers of models in float32 and float16: vLLM's own operators are for bfloat16, `state_ops` for any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm._vllm import LayerNameType  # torch looks here for what vLLM's annotations mean


def install() -> None:
    """For the stock wheel on a CPU: called in every worker, before models are made."""
    module = _vllm.gated_delta_layers()

    def in_any_dtype(original: Callable[..., None]) -> Callable[..., None]:
        def attend(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
            if mixed_qkv.dtype == torch.bfloat16:
                original(mixed_qkv, b, a, core_attn_out, layer_name)
                return
            context = _vllm.get_forward_context()
            layer = context.no_compile_layers[module._resolve_layer_name(layer_name)]
            metadata: Any = context.attn_metadata
            if metadata is not None and metadata[layer.prefix].num_actual_tokens:
                module._cpu_gdn_attention_nonspec(layer, metadata[layer.prefix], mixed_qkv, b, a, core_attn_out)

        return attend

    hooks.GATED_DELTA.wrap(module, in_any_dtype)
