"""LoRA: the base model's constants, a measure of every adapter, and a word when the weights change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.adapters import make_adapter
from tests.e2e.engine import DEMO_MODEL, run
from tests.e2e.prompts import recall_prompt
from tests.e2e.reports import ANSWER, BASELINE_BLOCK_BYTES, BLOCK_BYTES, MODEL, messages
from tests.e2e.server import Server, forked

PROMPTS = [recall_prompt(n, seed=n)[0] for n in (300, 411)]
SAMPLING = {"prompt_logprobs": 0, "max_tokens": 8}


@pytest.mark.parametrize("kv_format", ["k4v4", "k4v4-channel"])
def test_the_base_model_is_what_it_is_without_lora(kv_format: str, tmp_path: Path) -> None:
    def start(**options: Any) -> Any:
        section = {"kv_format": kv_format, "calibration_cache": str(tmp_path)}
        return run(PROMPTS, sampling=SAMPLING, additional_config={"fraqtl": section}, **options)

    ours = start(enable_lora=True)
    (path,) = tmp_path.iterdir()
    assert f"from the built-in prompt, kept in {path}" in ours.log
    plain = start()
    assert f"layers, from {path}" in plain.log  # one file for both
    assert ours.prompt_logprobs == [pytest.approx(row, abs=1e-3) for row in plain.prompt_logprobs]
    assert ours.tokens == plain.tokens


def ask(server: Server, model: str) -> dict[str, Any]:
    body = {"model": model, "messages": messages(), "temperature": 0, "max_tokens": 20}
    answer: dict[str, Any] = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    usage, report = answer["usage"], answer["fraqtl"]
    assert report["tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] - 1
    assert report["blocks"] == -(-report["tokens"] // 16) and report["bytes"] == report["blocks"] * BLOCK_BYTES
    assert report["baseline_bytes"] == report["blocks"] * BASELINE_BLOCK_BYTES
    return answer


def test_adapters_and_new_weights(tmp_path: Path) -> None:
    near, far = make_adapter(tmp_path / "near", 0.05), make_adapter(tmp_path / "far", 3.0)
    flags = ("--enable-lora", "--max-loras", "2", "--lora-modules", f"near={near}", f"far={far}")
    with forked(*flags, environment={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        assert "KV cache calibrated" in server.log
        assert "LoRA adapter near: the base model's constants fit" in server.log
        assert "LoRA adapter far moves keys or values far: k4v4 stores them up to" in server.log
        texts = [ask(server, name)["choices"][0]["message"]["content"] for name in (MODEL, "near", "far")]
        assert texts[0] == ANSWER != texts[2]
        reload(server, DEMO_MODEL)
        assert "The weights have changed" not in server.log
        reload(server, other_weights(tmp_path / "model"))
        assert server.log.count("The weights have changed") == 1
        assert ask(server, MODEL)["choices"][0]["message"]["content"] == ANSWER


def reload(server: Server, model: Path) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
    httpx.post(f"{server.url}/collective_rpc", json=body, timeout=60).raise_for_status()


def other_weights(folder: Path) -> Path:
    """The demo model with keys a hundredth larger."""
    shutil.copytree(DEMO_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: weight * 1.01 if "k_proj" in name else weight for name, weight in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
