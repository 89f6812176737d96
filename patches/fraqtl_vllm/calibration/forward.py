"""A forward pass over a prompt without a KV cache, outside of the scheduler, on all ranks of an engine.

Each pipeline stage takes what the one before it made, and hands its own on, as in vLLM's steps. What attention does
meanwhile is up to the layers' `recorder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fraqtl_vllm import _vllm
from fraqtl_vllm.calibration.prompt import Prompt
from fraqtl_vllm.calibration.recorder import Recorder
from fraqtl_vllm.calibration.states import metadata


def packed_layers(config: _vllm.VllmConfig) -> dict[str, Any]:
    """vLLM's attention layers that our backend serves, by name."""
    layers = config.compilation_config.static_forward_context.items()
    return {name: layer for name, layer in layers if hasattr(getattr(layer, "impl", None), "use_constants")}


def target_layers(config: _vllm.VllmConfig) -> dict[str, Any]:
    """Those of them that the model itself has, and not one that drafts for it: only they are calibrated."""
    return {name: layer for name, layer in packed_layers(config).items() if not layer.impl.is_draft}


def run(runner: Any, config: _vllm.VllmConfig, prompt: Prompt, recorder: Recorder, adapter: Any = None) -> None:
    """The prompt through the model, seen by `recorder`. adapter: vLLM's LoRARequest; the base model's weights alone
    without it."""
    model, layers = runner.get_model(), target_layers(config)
    device = next(model.parameters()).device
    kept = metadata(runner, layers, prompt.sequences, len(prompt.ids))
    with (
        _recorded(layers, recorder),
        torch.inference_mode(),
        _vllm.set_current_vllm_config(config),
        _vllm.set_forward_context(kept, config, num_tokens=len(prompt.ids), skip_compiled=True),
    ):
        _choose_adapter(runner, prompt, adapter)
        _stage(model, prompt.ids.to(device), prompt.positions.to(device))


def _stage(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> None:
    stages, ranks = _vllm.get_pp_group(), _vllm.get_tp_group()
    received = None
    if not stages.is_first_rank:
        received = _vllm.IntermediateTensors(stages.recv_tensor_dict(all_gather_group=ranks))
    made = model(input_ids=ids, positions=positions, intermediate_tensors=received)
    if not stages.is_last_rank:
        stages.send_tensor_dict(made.tensors, all_gather_group=ranks)


def _choose_adapter(runner: Any, prompt: Prompt, adapter: Any) -> None:
    """Layers with LoRA ask for the adapter of every token. The next step of the engine says anew which it is."""
    if runner.lora_config is None:
        return
    number = 0 if adapter is None else adapter.lora_int_id
    tokens = np.full(len(prompt.ids), number)
    runner._set_active_loras(tuple(tokens[: prompt.sequences]), tuple(tokens), {adapter} - {None})


@contextmanager
def _recorded(layers: dict[str, Any], recorder: Recorder) -> Iterator[None]:
    for layer in layers.values():
        layer.impl.recorder = recorder
    try:
        yield
    finally:
        for layer in layers.values():
            layer.impl.recorder = None
