"""Calibration of one worker: constants from disk, or from the built-in prompt."""

from __future__ import annotations

import time
from typing import Any

import torch

from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.errors import FraqtlError, UnsupportedError
from fraqtl_vllm import _vllm
from fraqtl_vllm.calibration import files
from fraqtl_vllm.calibration.projection import projections
from fraqtl_vllm.calibration.prompt import make_prompt
from fraqtl_vllm.calibration.recorder import Recorder
from fraqtl_vllm.calibration.states import metadata
from fraqtl_vllm.config import FraqtlConfig, settings_of
from fraqtl_vllm.start import progress
from fraqtl_vllm.support import calibration_obstacle

logger = _vllm.init_logger("vllm.fraqtl.calibration")

Constants = dict[str, LayerConstants]


def calibrate_worker(worker: Any) -> None:
    """Give the worker's layers their constants, from disk or from the built-in prompt. Raises UnsupportedError."""
    config = worker.vllm_config
    ours = settings_of(config)
    layers = packed_layers(config)
    if not layers or not any(each.is_calibrated for each in ours.formats):
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
    seconds = time.perf_counter() - start
    progress.say(f"KV cache calibrated in {seconds:.2f} s: {len(layers)} layers, {origin}")


def packed_layers(config: _vllm.VllmConfig) -> dict[str, Any]:
    """vLLM's attention layers that our backend serves, by name."""
    layers = config.compilation_config.static_forward_context.items()
    return {name: layer for name, layer in layers if hasattr(getattr(layer, "impl", None), "use_constants")}


def find_constants(worker: Any, ours: FraqtlConfig) -> tuple[Constants, str]:
    """The constants of every layer, by name, and where they come from."""
    config, model = worker.vllm_config, worker.model_runner.get_model()
    layers = packed_layers(config)
    group = _vllm.get_tp_group()
    stored_as = " ".join(
        [ours.format_name, *(layer.impl.kv_format.name for layer in layers.values() if ours.kv_layers)]
    )
    key = files.make_key(model, stored_as, group.rank_in_group, config)
    path = files.path_of(ours.calibration_cache, key)
    constants = files.load(path, key)
    if not all_ranks(group, constants is not None):
        constants = None
    device = next(model.parameters()).device
    if constants is not None:
        return {name: c.to(device) for name, c in constants.items()}, f"from {path}"
    constants = run_prompt(worker.model_runner, config, ours)
    saved = files.save(path, key, constants)
    return constants, "from the built-in prompt" + (f", kept in {path}" if saved else "")


def run_prompt(runner: Any, config: _vllm.VllmConfig, ours: FraqtlConfig) -> Constants:
    """One forward pass over the built-in prompt, without a KV cache. The layers' own attention is recorded."""
    model, prompt = runner.get_model(), make_prompt(config.model_config)
    device = next(model.parameters()).device
    layers = packed_layers(config)
    with torch.inference_mode(), _vllm.set_current_vllm_config(config):
        grams = projections(model, layers, config.model_config.dtype)
    targets = [layer.impl.kv_sharing_target_layer_name for layer in layers.values()]
    formats = {name: layer.impl.kv_format for name, layer in layers.items()}
    recorder = Recorder(formats, prompt.sequences, grams, targets)
    recorded = targets.count(None)
    kept = metadata(runner, layers, prompt.sequences, len(prompt.ids))
    for layer in layers.values():
        layer.impl.recorder = recorder
    try:
        with (
            progress.counted(_line(ours, len(prompt.ids)), recorded) as recorder.on_layer,
            torch.inference_mode(),
            _vllm.set_current_vllm_config(config),
            _vllm.set_forward_context(kept, config, num_tokens=len(prompt.ids), skip_compiled=True),
        ):
            model(input_ids=prompt.ids.to(device), positions=prompt.positions.to(device))
    finally:
        for layer in layers.values():
            layer.impl.recorder = None
    return recorder.constants


def _line(ours: FraqtlConfig, tokens: int) -> str:
    return f"calibrating the KV cache for {ours.format_name} with {tokens} tokens, once for this model, layer"


def all_ranks(group: Any, has_file: bool) -> bool:
    """Whether every tensor-parallel rank has its file."""
    if group.world_size == 1:
        return has_file
    flag = torch.tensor([int(has_file)])
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(flag.item())
