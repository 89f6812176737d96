from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fraqtl_kernels.errors import ConfigError
from fraqtl_serve.cli.checkpoint import check_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a configuration and one file of weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": np.zeros((8, 8), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def refusal(model: str | Path) -> str:
    with pytest.raises(ConfigError) as error:
        check_checkpoint(str(model))
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def test_whole_checkpoint_passes(checkpoint: Path) -> None:
    check_checkpoint(str(checkpoint))


@pytest.mark.parametrize("name", ["gpt2", "org/model", "org/model.v1"])
def test_hugging_face_ids_are_left_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_checkpoint(name)


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "../model", "~/model", "some/local/folder"])
def test_missing_path(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(path) == f"model path {path} does not exist"


def test_folder_without_a_configuration(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert refusal(checkpoint) == f"model folder {checkpoint} has no config.json"
    (checkpoint / "params.json").write_text("{}")  # Mistral's own format
    check_checkpoint(str(checkpoint))


def test_single_file_is_left_to_vllm(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    check_checkpoint(str(file))


@pytest.mark.parametrize("text", [b'{"model_type": "llama"', b"", b"\xff\xfe{}"])
def test_broken_configuration(checkpoint: Path, text: bytes) -> None:
    (checkpoint / "config.json").write_bytes(text)
    assert refusal(checkpoint).startswith(f"{checkpoint / 'config.json'} is not valid JSON: ")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[:-1], id="last byte missing"),
        pytest.param(lambda whole: whole[:20], id="cut in the header"),
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: b"\xff" * len(whole), id="garbage"),
        pytest.param(lambda whole: b"version https://git-lfs.github.com/spec/v1\nsize 3\n", id="Git LFS pointer"),
    ],
)
def test_broken_weights(checkpoint: Path, damage: Any) -> None:
    file = checkpoint / "model-00002-of-00002.safetensors"
    file.write_bytes(damage((checkpoint / "model.safetensors").read_bytes()))
    assert refusal(checkpoint).startswith(f"{file} is not a readable safetensors file: ")


def test_link_to_nowhere(checkpoint: Path) -> None:
    file = checkpoint / "other.safetensors"
    file.symlink_to(checkpoint / "gone")
    assert refusal(checkpoint).startswith(f"{file} is not a readable safetensors file: ")
