"""Calibration of one worker: constants from disk, or from the built-in prompt."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.errors import FraqtlError, UnsupportedError
from fraqtl_vllm import _vllm
from fraqtl_vllm.calibration import adapters, files, forward, weights_changed
from fraqtl_vllm.calibration.forward import target_layers
from fraqtl_vllm.calibration.projection import projections
from fraqtl_vllm.calibration.prompt import make_prompt
from fraqtl_vllm.calibration.ranks import on_all, one_engine_at_a_time, over_stages
from fraqtl_vllm.calibration.recorder import Recorder
from fraqtl_vllm.config import FraqtlConfig, settings_of
from fraqtl_vllm.start import progress
from fraqtl_vllm.support import calibration_obstacle

logger = _vllm.init_logger("vllm.fraqtl.calibration")

Constants = dict[str, LayerConstants]


def calibrate_worker(worker: Any) -> None:
    """Give the worker's layers their constants, from disk or from the built-in prompt. Raises UnsupportedError."""
    config = worker.vllm_config
    ours = settings_of(config)
    layers = target_layers(config)
    count = over_stages(len(layers))
    if not count or not any(each.is_calibrated for each in ours.formats):
        return
    obstacle = "it is switched off" if not ours.calibration else calibration_obstacle(config)
    if obstacle is not None:
        logger.warning("The KV cache is not calibrated: %s. %s is coarser without.", obstacle, ours.format_name)
        return
    start = time.perf_counter()
    try:
        constants, origin = find_constants(worker, ours)
    except FraqtlError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"the KV cache could not be calibrated ({type(error).__name__}: {error}): start with --no-kv-calibration"
        ) from error
    for name, layer in layers.items():
        layer.impl.use_constants(constants[layer.impl.kv_sharing_target_layer_name or name])
    adapters.watch(worker)
    weights_changed.watch(worker, partial(key_of, worker, ours))
    seconds = time.perf_counter() - start
    progress.say(f"KV cache calibrated in {seconds:.2f} s: {count} layers, {origin}")


def find_constants(worker: Any, ours: FraqtlConfig) -> tuple[Constants, str]:
    """The constants of every layer, by name, and where they come from."""
    config, key = worker.vllm_config, key_of(worker, ours)
    path = files.path_of(ours.calibration_cache, key)
    device = next(worker.model_runner.get_model().parameters()).device
    constants, origin = _read(path, key), f"from {path}"
    if constants is None:
        with one_engine_at_a_time(path.parent) as has_waited:
            constants = _read(path, key) if has_waited else None
            if constants is None:
                constants = run_prompt(worker.model_runner, config, ours)
                saved = files.save(path, key, constants)
                origin = "from the built-in prompt" + (f", kept in {path}" if saved else "")
            on_all(True)  # the next engine finds the files of all ranks
    return {name: c.to(device) for name, c in constants.items()}, origin


def key_of(worker: Any, ours: FraqtlConfig) -> str:
    """What the constants of this rank follow from, as its weights are now."""
    layers, rank = target_layers(worker.vllm_config), _vllm.get_tp_group().rank_in_group
    stored_as = " ".join(
        [ours.format_name, *(layer.impl.kv_format.name for layer in layers.values() if ours.kv_layers)]
    )
    return files.make_key(worker.model_runner.get_model(), stored_as, rank, worker.vllm_config)


def _read(path: Path, key: str) -> Constants | None:
    """What the file of this rank says, if every rank has its own."""
    constants = files.load(path, key)
    return constants if on_all(constants is not None) else None


def run_prompt(runner: Any, config: _vllm.VllmConfig, ours: FraqtlConfig) -> Constants:
    """What one forward pass over the built-in prompt shows of the layers."""
    prompt, layers = make_prompt(config.model_config), target_layers(config)
    with torch.inference_mode(), _vllm.set_current_vllm_config(config):
        grams = projections(runner.get_model(), layers, config.model_config.dtype)
    targets = [layer.impl.kv_sharing_target_layer_name for layer in layers.values()]
    formats = {name: layer.impl.kv_format for name, layer in layers.items()}
    recorder = Recorder(formats, prompt.sequences, grams, targets)
    with progress.counted(_line(ours, len(prompt.ids)), targets.count(None)) as recorder.on_layer:
        forward.run(runner, config, prompt, recorder)
    return recorder.constants


def _line(ours: FraqtlConfig, tokens: int) -> str:
    return f"calibrating the KV cache for {ours.format_name} with {tokens} tokens, once for this model, layer"
