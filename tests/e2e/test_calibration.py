"""Calibration in the engine: a key bias as Qwen2 has, and files that are missing, broken or of another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.e2e.engine import DEMO_MODEL, Run, run
from tests.e2e.prompts import recall_prompt

PROMPTS = [recall_prompt(n, seed=n)[0] for n in (300, 411, 640)]
ANEW = "from the built-in prompt"


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a constant of 120 added to the slowest eighth of the RoPE pairs of every key."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("biased")
    config = AutoConfig.from_pretrained(DEMO_MODEL, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, config=config, dtype=torch.bfloat16)
    size = config.head_dim
    slow = torch.arange(size // 2 - size // 16, size // 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.zero_()
            if name.endswith("k_proj.bias"):
                heads = parameter.view(-1, size)
                heads[:, slow] = heads[:, slow + size // 2] = 120.0
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


def start(model: Path, cache: Path, kv_format: str = "k4v4", calibration: bool = True) -> Run:
    section = {"kv_format": kv_format, "calibration": calibration, "calibration_cache": str(cache)}
    sampling = {"prompt_logprobs": 0, "max_tokens": 8}
    return run(PROMPTS, model=model, sampling=sampling, additional_config={"fraqtl": section})


def loss(result: Run) -> float:
    """Mean -log p of the prompts' tokens."""
    found = [x for row in result.prompt_logprobs for x in row]
    return -sum(found) / len(found)


def metadata(path: Path) -> dict[str, str]:
    """The key, the names of the layers and the checksum of the tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_key_bias_needs_and_gets_its_center(biased_model: Path, tmp_path: Path) -> None:
    exact, ours = start(biased_model, tmp_path, "bf16"), start(biased_model, tmp_path)
    plain = start(biased_model, tmp_path / "off", calibration=False)
    assert "calibrated" not in exact.log and ANEW in ours.log
    assert "The KV cache is not calibrated: it is switched off" in plain.log and not (tmp_path / "off").exists()
    costs = {"calibrated": loss(ours) - loss(exact), "not calibrated": loss(plain) - loss(exact)}
    assert abs(costs["calibrated"]) < 0.05 and costs["not calibrated"] > 0.25, costs


def test_broken_and_foreign_files_are_said_and_replaced(biased_model: Path, tmp_path: Path) -> None:
    first = start(biased_model, tmp_path)
    (path,) = tmp_path.iterdir()
    intact, contents = path.read_bytes(), metadata(path)
    assert f"kept in {path}" in first.log
    again = start(biased_model, tmp_path)
    assert f"layers, from {path}" in again.log and again.tokens == first.tokens
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 0x55]))
    mended = start(biased_model, tmp_path)
    assert f"{path} is corrupt" in mended.log and mended.tokens == first.tokens
    assert metadata(path) == contents
    start(DEMO_MODEL, tmp_path)
    (other,) = set(tmp_path.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    mended = start(biased_model, tmp_path)
    assert f"{path} belongs to another model" in mended.log and mended.tokens == first.tokens
    assert metadata(path) == contents
