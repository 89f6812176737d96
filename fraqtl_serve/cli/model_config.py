"""Reads a model's shape from its config.json: a file, a model folder, or a Hugging Face id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_serve.cli.model_states import ATTENTION_LAYERS, STATE_LAYERS, layer_kinds, read_states
from fraqtl_serve.cli.sizing import LayerKind, ModelShape

# The names that model families use for the same number.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HIDDEN = ("hidden_size", "n_embd")
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def read_shape(source: str) -> ModelShape:
    """The shape of the model at `source`. Raises ConfigError or UnsupportedError in one sentence."""
    text = _text_config(_load(source))
    _check_kind(source, text)
    states = read_states(source, text)
    sizes: dict[tuple[int, int], Counter[int]] = {}
    for kv_heads, head_size, window in _layers(source, text):
        sizes.setdefault((kv_heads, head_size), Counter())[window] += 1
    if not sizes:
        raise UnsupportedError(f"{source}: the packed KV cache does not support models without attention")
    (kv_heads, head_size), windows = max(sizes.items(), key=lambda size: size[1].total())  # the rest are the others
    if len([window for window in windows if window]) > 1:
        raise UnsupportedError(f"{source}: windows of different lengths can't be planned")
    others = [
        LayerKind(layers, *size, window)
        for size, found in sizes.items()
        for window, layers in found.items()
        if size != (kv_heads, head_size)
    ]
    window = max(windows)
    return ModelShape(
        name=Path(source).parent.name if source.endswith(".json") else source.rstrip("/").split("/")[-1],
        layers=windows.total(),
        kv_heads=kv_heads,
        head_size=head_size,
        context=_number(source, text, CONTEXT),
        window=window,
        windowed_layers=windows[window] if window else 0,
        others=tuple(others),
        states=states,
    )


def read_layer_kinds(source: str) -> list[str]:
    """The kind of every layer of the model at `source`, or nothing if all attend alike. Raises ConfigError."""
    return layer_kinds(_text_config(_load(source)))


def _layers(source: str, text: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(KV heads, head size, window or 0) of every layer that stores keys and values."""
    count, heads = _number(source, text, LAYERS), _first(text, HEADS)
    hidden = _first(text, HIDDEN)
    head_size = text.get("head_dim")
    if not isinstance(head_size, int) and isinstance(hidden, int) and isinstance(heads, int):
        head_size = hidden // heads
    if not isinstance(head_size, int):
        raise ConfigError(f"{source}: no head_dim and no hidden_size: give --layers, --kv-heads and --head-size")
    kv_heads, windows = _kv_heads(source, text, count, heads), _windows(text, count)
    kinds = layer_kinds(text)[:count] or ["full_attention"] * count
    layers = [
        (n, head_size, window)
        if window or not any(windows)  # what Gemma 4 has beside its windows may be of another size
        else (int(text.get("num_global_key_value_heads") or n), int(text.get("global_head_dim") or head_size), 0)
        for n, window, kind in zip(kv_heads, windows, kinds, strict=True)
        if kind not in STATE_LAYERS
    ]
    kept = layers[: count - int(text.get("num_kv_shared_layers") or 0)]  # the last ones read the cache of others
    return [layer for layer in kept if layer[0]]


def _kv_heads(source: str, text: Mapping[str, Any], count: int, heads: Any) -> list[int]:
    """Of every layer; 0 for one without attention."""
    if text.get("multi_query"):
        return [1] * count
    value: Any = (
        _of_blocks(text["block_configs"], heads) if text.get("block_configs") else _first(text, KV_HEADS) or heads
    )
    values = value if isinstance(value, list) else [value] * count
    if len(values) == count and all(isinstance(one, int) for one in values):
        return values
    raise ConfigError(
        f"{source}: {KV_HEADS[0]} is no number for every layer: give --layers, --kv-heads and --head-size"
    )


def _of_blocks(blocks: Any, heads: Any) -> list[int] | None:
    """KV heads by the blocks of a Nemotron-NAS, which searched for every layer's own; None if they don't say."""
    try:
        parts = [block["attention"] for block in blocks]
        return [0 if part.get("no_op") else heads // part["n_heads_in_group"] for part in parts]
    except (KeyError, TypeError):
        return None


def _load(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not readable JSON: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds no object: give a model's config.json")
        return config
    if path.suffix == ".json" or path.name == "config.json" or source.startswith(("/", ".", "~")):
        raise ConfigError(f"{path} does not exist: give a model's config.json, its folder, or a Hugging Face id")
    return _download(source)


def _download(model: str) -> dict[str, Any]:
    try:
        from transformers import PretrainedConfig

        config, _ = PretrainedConfig.get_config_dict(model)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"no config.json of {model}: {reason}") from None
    return dict(config)


def _text_config(config: dict[str, Any]) -> Mapping[str, Any]:
    """The language model's part, with the defaults of its family that config.json leaves out."""
    try:
        from transformers import AutoConfig

        own = {key: value for key, value in config.items() if key != "model_type"}
        return dict(AutoConfig.for_model(config["model_type"], **own).get_text_config().to_dict())
    except Exception:  # a family that transformers doesn't know, or no transformers: what is written must do
        text = config.get("text_config")
        return text if isinstance(text, Mapping) else config


def _check_kind(source: str, text: Mapping[str, Any]) -> None:
    kinds = set(layer_kinds(text))
    if text.get("kv_lora_rank"):
        raise UnsupportedError(f"{source}: the packed KV cache does not support MLA models")
    if kinds - ATTENTION_LAYERS - STATE_LAYERS:
        unknown = ", ".join(sorted(kinds - ATTENTION_LAYERS - STATE_LAYERS))
        raise UnsupportedError(f"{source}: the packed KV cache does not support layers of type {unknown}")


def _windows(text: Mapping[str, Any], layers: int) -> list[int]:
    """How many tokens each layer sees; 0 for all."""
    window, kinds = text.get("sliding_window"), text.get("layer_types")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return [0] * layers
    return [window * (kind == "sliding_attention") for kind in kinds[:layers]] if kinds else [window] * layers


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((text[name] for name in names if text.get(name) is not None), None)


def _number(source: str, text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = _first(text, names)
    if not isinstance(value, int):
        raise ConfigError(f"{source}: {names[0]} is missing: give --layers, --kv-heads and --head-size instead")
    return value
