"""Never a silent no-op: a worker that was asked for a packed cache and holds another one ends in one sentence.

vLLM chooses an attention backend layer by layer, by its platform and for its own reasons, and falls back with a line
in the log at most. So what counts is looked at in the worker itself, when its layers and its pool are there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import _vllm
from fraqtl_vllm.attention.backend import FraqtlBackend
from fraqtl_vllm.names import BACKEND_NAME
from fraqtl_vllm.platform.stock_cpu import advice
from fraqtl_vllm.support import asks_for_packed_cache, check_backend_is_chosen

logger = _vllm.init_logger("vllm.fraqtl.start")


def check_worker(worker: Any) -> None:
    """Raises UnsupportedError unless every attention layer is ours and its part of the pool has our format's bytes.

    Called when the worker has its KV cache. Does nothing where the packed cache was not asked for.
    """
    config = worker.vllm_config
    if not asks_for_packed_cache(config):
        return
    check_backend_is_chosen(config)
    layers = attention_layers(config)
    if not layers:
        raise UnsupportedError(f"--attention-backend {BACKEND_NAME}: this model has no attention layer to serve")
    for name, layer in layers.items():
        _check_backend(name, layer)
        _check_pool(name, layer)
    kinds = Counter((layer.impl.kv_format.name, layer.kv_cache.shape[-1]) for layer in layers.values())
    for (kv_format, size), count in kinds.items():
        logger.info(
            "Packed KV cache: %d attention layers, all %s, in pages of %s: %d bytes a token and KV head",
            count,
            BACKEND_NAME,
            kv_format,
            size,
        )


def attention_layers(config: _vllm.VllmConfig) -> dict[str, Any]:
    """vLLM's layers that attend, whatever serves them, by name: not those that keep a state."""
    layers = config.compilation_config.static_forward_context.items()
    attending = {name: layer for name, layer in layers if isinstance(layer, _vllm.AttentionLayerBase)}
    return {name: layer for name, layer in attending.items() if not layer.get_attn_backend().is_ssm()}


def _check_backend(name: str, layer: Any) -> None:
    backend = layer.get_attn_backend()
    if not issubclass(backend, FraqtlBackend):
        raise UnsupportedError(
            f"{BACKEND_NAME} was asked for, but vLLM gave layer {name} to {_name(backend)}, "
            f"and its cache would not be packed: {advice()}"
        )


def _check_pool(name: str, layer: Any) -> None:
    """`layer.kv_cache`: (blocks, KV heads, N, bytes per token), the layer's part of the pool."""
    pages = layer.kv_cache
    kv_format = layer.impl.kv_format
    expected = kv_format.bytes_per_token(layer.head_size)
    if pages.dtype != torch.uint8 or pages.dim() != 4 or pages.shape[-1] != expected:
        held = " x ".join(map(str, pages.shape))
        raise UnsupportedError(
            f"the pool of layer {name} is not packed: {kv_format.name} needs {expected} bytes a token and KV head, "
            f"but vLLM allocated {held} of {str(pages.dtype).removeprefix('torch.')}"
        )


def _name(backend: Any) -> str:
    try:
        return str(backend.get_name())
    except NotImplementedError:
        return str(backend.__name__)
