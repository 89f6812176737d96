"""Calibration constants on disk: one safetensors file for a model's weights, a format and a tensor-parallel rank.

A file says which key it was made for and carries a checksum of its tensors. One that can't be read, or that belongs
to something else, is never used: it is named in the log, and calibration runs anew and replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fraqtl_kernels.constants import TENSOR_NAMES, LayerConstants
from fraqtl_vllm import _vllm
from fraqtl_vllm.calibration.weights import add_weights

logger = _vllm.init_logger("vllm.fraqtl.calibration")

VERSION = 5  # of the procedure and of the tensors' names: another number makes every old file unknown


def default_folder() -> Path:
    """$XDG_CACHE_HOME/fraqtl-serve/calibration, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fraqtl-serve" / "calibration"


def path_of(folder: str | None, key: str) -> Path:
    return (Path(folder) if folder else default_folder()) / f"{key[:32]}.safetensors"


def make_key(model: torch.nn.Module, kv_format: str, rank: int, config: _vllm.VllmConfig) -> str:
    """A hash of all that the constants follow from: a sample of every weight, the format, the rank, the context."""
    digest = hashlib.sha256(f"{VERSION} {kv_format} {rank} {config.model_config.max_model_len}".encode())
    add_weights(digest, model, config.model_config.dtype)
    return digest.hexdigest()


def load(path: Path, key: str) -> dict[str, LayerConstants] | None:
    """The constants of every layer by name, on the CPU, or None where there is no usable file. Says why not."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:  # safetensors has errors of its own, and what a broken file raises is open
        logger.warning("The calibration file %s can't be read (%s): calibrating anew", path, error)
        return None
    if metadata.get("version") != str(VERSION):
        logger.warning("The calibration file %s was made by another version: calibrating anew", path)
        return None
    if metadata.get("key") != key:
        logger.warning("The calibration file %s belongs to another model or format: calibrating anew", path)
        return None
    if metadata.get("checksum") != checksum(tensors):
        logger.warning("The calibration file %s is corrupt (wrong checksum): calibrating anew", path)
        return None
    layers = json.loads(metadata["layers"])
    return {
        name: LayerConstants.from_tensors({x: tensors[f"{name}/{x}"] for x in TENSOR_NAMES if f"{name}/{x}" in tensors})
        for name in layers
    }


def save(path: Path, key: str, constants: dict[str, LayerConstants]) -> bool:
    """Write the file, or nothing at all. Returns whether it was written; if not, the log says why."""
    tensors = {
        f"{name}/{part}": tensor.cpu().contiguous()
        for name, layer in constants.items()
        for part, tensor in layer.tensors().items()
    }
    metadata = {
        "version": str(VERSION),
        "key": key,
        "checksum": checksum(tensors),
        "layers": json.dumps(list(constants)),
    }
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(safetensors.torch.save(tensors, metadata))
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        logger.warning("The calibration is not kept, every start repeats it: %s", error)
        return False
    return True


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
