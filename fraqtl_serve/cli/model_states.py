"""Reads what the layers of a hybrid model keep in the place of keys and values, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_serve.cli.sizing import StateKind

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "hybrid"})
STATE_LAYERS = frozenset({"linear_attention", "mamba", "conv"})
BESIDE_ATTENTION = "hybrid"  # a layer of both kinds

# By vLLM's argument the name in config.json, as model families have it.
DELTA = {
    "num_k_heads": "linear_num_key_heads",
    "num_v_heads": "linear_num_value_heads",
    "head_k_dim": "linear_key_head_dim",
    "head_v_dim": "linear_value_head_dim",
    "conv_kernel_size": "linear_conv_kernel_dim",
}
MAMBA2 = {
    "n_groups": "mamba_n_groups",
    "num_heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "state_size": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
}
CONV = {"intermediate_size": "hidden_size", "conv_kernel": "conv_L_cache"}


def layer_kinds(text: Mapping[str, Any]) -> list[str]:
    """The kind of every layer, or nothing if all attend."""
    if text.get("model_type") == "falcon_h1":  # which knows no other layers, and doesn't list them
        return [BESIDE_ATTENTION] * int(text.get("num_hidden_layers") or 0)
    return list(text.get("layer_types") or text.get("layers_block_type") or ())


def read_states(source: str, text: Mapping[str, Any]) -> StateKind | None:
    """None where all layers attend. Raises ConfigError or UnsupportedError in one sentence."""
    layers = sum(kind in STATE_LAYERS or kind == BESIDE_ATTENTION for kind in layer_kinds(text))
    if not layers:
        return None
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if DELTA["num_v_heads"] in text:
        return StateKind(layers, "delta", _sizes(source, text, DELTA), (dtype, text.get("mamba_ssm_dtype") or dtype))
    if MAMBA2["num_heads"] in text:
        sizes = _sizes(source, text, MAMBA2)
        inner = {"intermediate_size": sizes["num_heads"] * sizes["head_dim"]}
        return StateKind(layers, "mamba2", inner | sizes, (dtype, dtype))
    if CONV["conv_kernel"] in text:
        return StateKind(layers, "conv", _sizes(source, text, CONV), (dtype,))
    kinds = ", ".join(sorted(set(layer_kinds(text)) & STATE_LAYERS))
    raise UnsupportedError(f"{source}: layers of type {kinds} in this {text.get('model_type')} can't be planned")


def _sizes(source: str, text: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    wrong = [name for name in names.values() if not isinstance(text.get(name), int) or text[name] < 1]
    if wrong:
        raise ConfigError(
            f"{source}: {wrong[0]} is no number above 0: a hybrid model needs {', '.join(names.values())}"
        )
    return {argument: text[name] for argument, name in names.items()}
