"""How well the base model's constants fit what a LoRA adapter makes of keys and values.

When an adapter is loaded, the built-in prompt runs through the model with it. What counts is the size of the rounding
steps: with the constants that the pool has, beside those that the adapter would get if it were merged into the model.
Adapters that are loaded with their first request (`LLM`, one that was evicted) are not measured: pipeline stages are
at different steps then. So are replicas that share experts, always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels.calibration.importance import Importance
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import LayerConstants, StreamConstants
from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm.calibration import forward
from fraqtl_vllm.calibration.projection import projections
from fraqtl_vllm.calibration.prompt import make_prompt
from fraqtl_vllm.calibration.ranks import is_first, largest
from fraqtl_vllm.calibration.recorder import Recorder
from fraqtl_vllm.config import settings_of

FAR = 1.5
"""Times as coarse as with constants of its own; what that costs: docs/guides/calibration.md."""

FINEST = "k8v8"  # of the packed formats

logger = _vllm.init_logger("vllm.fraqtl.calibration")


class Comparison(Recorder):
    """Compares constants in use with those that the layer would get. `coarseness`: the largest of all layers."""

    in_use: dict[str, LayerConstants]
    coarseness = 1.0

    def keep(self, layer: str, key: Tensor, query: Tensor, value: Tensor, importance: Importance) -> None:
        own, used = calibrate(self.formats[layer], key, query, value, importance), self.in_use[layer]
        for x, mine, theirs in ((key, own.key, used.key), (value, own.value, used.value)):
            self.coarseness = max(self.coarseness, coarseness(x, theirs, mine))


def coarseness(x: Tensor, used: StreamConstants, own: StreamConstants) -> float:
    """How many times larger the steps of keys or values are with `used` than with `own`, in the mean over tokens, of
    the worst head. Of static steps: how many times too small or too large, in the mean over channels.

    x: (tokens, KV heads, D), floating point.
    """
    if used.scale is not None and own.scale is not None:
        ratio = own.scale / used.scale.to(own.scale)
        return float(torch.maximum(ratio, 1 / ratio).mean(-1).max())
    if used.transform is None or own.transform is None:
        return 1.0
    return float((_reach(x, used) / _reach(x, own).clamp_min(torch.finfo(torch.float32).tiny)).max())


def _reach(x: Tensor, stream: StreamConstants) -> Tensor:
    """What a vector's largest code has to reach, in the mean over tokens: (KV heads,)."""
    assert stream.transform is not None
    reach = stream.transform.apply(x.float()).abs().amax(-1)
    if stream.outlier_center is not None:
        reach = torch.minimum(reach, stream.transform.apply(x.float(), stream.outlier_center).abs().amax(-1))
    return reach.mean(0)


def watch(worker: Any) -> None:
    """Measure every adapter that a calibrated worker is told to load."""
    config = worker.vllm_config
    if config.lora_config is not None and config.parallel_config.data_parallel_size == 1:
        hooks.ADAPTERS.wrap(worker.model_runner, lambda add: _then_measured(worker, add))


def _then_measured(worker: Any, add: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def add_lora(request: Any) -> bool:
        is_new = request.load_inplace or request.lora_int_id not in worker.model_runner.list_loras()
        loaded = add(request)
        if loaded and is_new:
            tell(request.lora_name, settings_of(worker.vllm_config).format_name, measure(worker, request))
        return loaded

    return add_lora


def measure(worker: Any, request: Any) -> float:
    """The coarseness of an adapter that is loaded, over all ranks. request: vLLM's LoRARequest."""
    config, runner = worker.vllm_config, worker.model_runner
    layers, prompt = forward.target_layers(config), make_prompt(config.model_config)
    targets = [layer.impl.kv_sharing_target_layer_name for layer in layers.values()]
    with torch.inference_mode(), _vllm.set_current_vllm_config(config):
        grams = projections(runner.get_model(), layers, config.model_config.dtype)
    formats = {name: layer.impl.kv_format for name, layer in layers.items()}
    comparison = Comparison(formats, prompt.sequences, grams, targets)
    comparison.in_use = {name: layer.impl.constants for name, layer in layers.items()}
    forward.run(runner, config, prompt, comparison, request)
    return largest(comparison.coarseness)


def tell(name: str, kv_format: str, found: float) -> None:
    """Say it once for all ranks: a warning if it is far."""
    if not is_first():
        return
    if found < FAR:
        logger.info("LoRA adapter %s: the base model's constants fit, steps at most %.2f times as large", name, found)
        return
    logger.warning(
        "LoRA adapter %s moves keys or values far: %s stores them up to %.1f times as coarsely as with constants of "
        "their own. Merge it into the model%s",
        name,
        kv_format,
        found,
        "" if kv_format == FINEST else f", or choose --kv-format {FINEST}",
    )
