"""Reads a model's shape from its config.json: a file, a model folder, or a Hugging Face id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_serve.sizing import ModelShape

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
    layers, heads = _number(source, text, LAYERS), _number(source, text, HEADS)
    windowed, window = _windows(text, layers)
    hidden = _first(text, HIDDEN)
    head_size = text.get("head_dim") or (hidden // heads if isinstance(hidden, int) else None)
    if not isinstance(head_size, int):
        raise ConfigError(f"{source}: no head_dim and no hidden_size: give --layers, --kv-heads and --head-size")
    return ModelShape(
        name=Path(source).parent.name if source.endswith(".json") else source.rstrip("/").split("/")[-1],
        layers=layers,
        kv_heads=1 if text.get("multi_query") else int(_first(text, KV_HEADS) or heads),
        head_size=head_size,
        context=_number(source, text, CONTEXT),
        window=window,
        windowed_layers=windowed,
    )


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
    kinds = set(text.get("layer_types") or ())
    if text.get("kv_lora_rank"):
        raise UnsupportedError(f"{source}: the packed KV cache does not support MLA models")
    if kinds - {"full_attention", "sliding_attention"}:
        unknown = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        raise UnsupportedError(f"{source}: the packed KV cache does not support layers of type {unknown}")


def _windows(text: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """How many layers have a sliding window, and how long it is."""
    window = text.get("sliding_window")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return 0, 0
    kinds = text.get("layer_types")
    return (sum(kind == "sliding_attention" for kind in kinds) if kinds else layers), window


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((text[name] for name in names if text.get(name) is not None), None)


def _number(source: str, text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = _first(text, names)
    if not isinstance(value, int):
        raise ConfigError(f"{source}: {names[0]} is missing: give --layers, --kv-heads and --head-size instead")
    return value
