"""Gated delta layers on a CPU, where vLLM's own code is for bfloat16, and in 0.32 for drafts that are equally long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm._vllm import LayerNameType  # torch looks here for what vLLM's annotations mean
from fraqtl_vllm.platform.state_ops import convolve_drafts, delta_drafts


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
            if metadata is None or not metadata[layer.prefix].num_actual_tokens:
                return
            batch = layer, metadata[layer.prefix], mixed_qkv, b, a, core_attn_out
            width, kept = layer.conv1d.weight.shape[-1], module._conv_buffer_view(layer).shape[-1]
            if kept == width - 1:
                module._cpu_gdn_attention_nonspec(*batch)
            else:  # it also keeps what drafts may take back
                module._cpu_gdn_attention_spec_aware(*batch, width, kept)

        return attend

    hooks.GATED_DELTA.wrap(module, in_any_dtype)
    if hooks.GATED_DRAFTS.only == _vllm.VERSION:
        hooks.GATED_DRAFTS.wrap(module, lambda _: attend_drafts)


def attend_drafts(
    layer: Any,
    metadata: Any,
    mixed_qkv: Tensor,
    b: Tensor,
    a: Tensor,
    kept: Tensor,
    states: Tensor,
    width: int,
    kept_tokens: int,
) -> Tensor:
    """A token and its drafts of every sequence, (tokens, heads, V).

    mixed_qkv: (tokens, dim). a, b: (tokens, heads). kept: (pool, dim, kept_tokens), what a convolution of `width` needs
    of the tokens before, those that may be taken back included. states: (pool, heads, K, V).
    """
    count = metadata.num_spec_decodes
    rows, starts = metadata.spec_state_indices_tensor[:count], metadata.spec_query_start_loc[: count + 1]
    accepted = metadata.num_accepted_tokens[:count]
    weight, bias, silu = layer.conv1d.weight.flatten(1), layer.conv1d.bias, layer.activation == "silu"
    convolved = convolve_drafts(mixed_qkv, weight, bias, kept, rows[:, 0], accepted, starts, silu)
    query, key, value = (x.squeeze(0) for x in layer.rearrange_mixed_qkv(convolved))
    return delta_drafts(
        layer.A_log,
        layer.dt_bias,
        query,
        key,
        value,
        a,
        b,
        states,
        rows,
        accepted,
        starts,
        is_normed=True,
        softplus_beta=1.0,  # this and the threshold: torch's and vLLM's defaults
        softplus_threshold=20.0,
    )
