"""LoRA adapters with random weights, as PEFT saves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.engine import DEMO_MODEL

MODULES = ("q_proj", "k_proj", "v_proj")
RANK = 4


def make_adapter(folder: Path, strength: float, modules: Sequence[str] = MODULES) -> Path:
    """For the demo model. strength: the norm of what is added to a weight, in units of the weight's own."""
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(DEMO_MODEL / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules:
            continue
        outputs, inputs = weight.shape
        a, b = torch.randn(RANK, inputs, generator=random), torch.randn(outputs, RANK, generator=random)
        b *= strength * weight.float().norm() / (b @ a).norm()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "target_modules": list(modules)}))
    return folder
