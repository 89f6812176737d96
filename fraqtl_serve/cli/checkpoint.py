"""A look at a local model folder before an engine is started for it."""

from __future__ import annotations

import json
from pathlib import Path

from fraqtl_kernels.errors import ConfigError


def check_checkpoint(model: str) -> None:
    """Raises ConfigError, in one sentence, for a model path that can't be loaded.

    Hugging Face ids are left to vLLM; only what is, or looks like, a path is checked.
    """
    folder = Path(model)
    if not folder.exists():
        if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
            raise ConfigError(f"model path {model} does not exist")
        return
    if not folder.is_dir():
        return  # a GGUF file, say
    config = folder / "config.json"
    if not config.is_file() and not (folder / "params.json").is_file():
        raise ConfigError(f"model folder {model} has no config.json")
    if config.is_file():
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{config} is not valid JSON: {error}") from None
    for file in sorted(folder.glob("*.safetensors")):
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a readable safetensors file: {error}") from None
