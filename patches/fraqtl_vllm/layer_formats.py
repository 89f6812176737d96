"""A format for each layer: what `kv_layers` of our settings says, carried to vLLM's layers and their part of the pool.

Layers that attend all tokens share blocks, and a block has as many bytes of each layer as its pages take: nothing is
lost where they differ. Where windows are unlike, vLLM pads all pages to the largest, which would be the saving.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import KVFormat
from fraqtl_vllm import _vllm, speculation
from fraqtl_vllm.config import FraqtlConfig, settings_of

_REFUSED = "the packed KV cache does not support formats of single layers"
INSTEAD = "give one --kv-format for all layers"
UNLIKE_WINDOWS = f"{_REFUSED} in models with windows on some layers only yet: {INSTEAD}"
IN_HYBRIDS = f"{_REFUSED} in hybrid models yet: {INSTEAD}"


def check(config: _vllm.VllmConfig, ours: FraqtlConfig) -> None:
    """Raises ConfigError or UnsupportedError if `kv_layers` can't be had for this model, before it is loaded."""
    if not ours.kv_layers and ours.kv_layer_count is None:
        return
    model = config.model_config
    ours.by_layer(_layers_of(config))
    if model.is_hybrid:
        raise UnsupportedError(IN_HYBRIDS)
    if len(set(getattr(model.hf_text_config, "layer_types", None) or ())) > 1:
        raise UnsupportedError(UNLIKE_WINDOWS)


def in_own_formats(config: _vllm.VllmConfig, specs: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's specs by layer, each with the bytes of its layer's own format, which the layer is told of, too.

    layers: those that our backend serves, by name. Raises UnsupportedError if vLLM would pad their pages.
    """
    ours, has_drafts = settings_of(config), speculation.draft_model_of(config) is not None
    if not ours.kv_layers and not has_drafts:
        return dict(specs)
    if ours.kv_layers:
        _hand_out(ours.by_layer(_layers_of(config)), layers)
    own = {
        name: replace(specs[name], state_content_bytes=layer.impl.kv_format.bytes_per_token(specs[name].head_size))
        for name, layer in layers.items()
        if name in specs
    }
    if has_drafts:
        speculation.check_windows(own)
    if own and not _vllm.UniformTypeKVCacheSpecs.is_uniform_type(own):
        raise UnsupportedError(UNLIKE_WINDOWS)
    return {**specs, **own}


def _hand_out(formats: Sequence[KVFormat], layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        if layer.impl.is_draft:  # they have a format of their own, and numbers that say nothing
            continue
        pages_of = layer.impl.kv_sharing_target_layer_name or name
        layer.impl.use_format(formats[_vllm.extract_layer_index(pages_of)])


def by_layer(config: _vllm.VllmConfig) -> list[str] | None:
    """The format's name of every layer; None where all have the one that `kv_format` says."""
    ours = settings_of(config)
    return [each.name for each in ours.by_layer(_layers_of(config))] if ours.kv_layers else None


def name_of(config: _vllm.VllmConfig) -> str:
    """What reports call the formats: k4v4, or k4v4+k8v8 where layers differ, the most frequent first."""
    counts = Counter(by_layer(config) or [settings_of(config).kv_format])
    return "+".join(name for name, _ in counts.most_common())


def _layers_of(config: _vllm.VllmConfig) -> int:
    return int(config.model_config.hf_text_config.num_hidden_layers)
