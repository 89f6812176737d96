"""Names that were given up work for one more version, and say what they are called now."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fraqtl_bench.cli import main as bench
from fraqtl_bench.quality.server_codec import read_constants
from fraqtl_kernels.errors import ConfigError
from fraqtl_serve.cli import serve
from fraqtl_vllm import config
from fraqtl_vllm.calibration import files


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_said", set())


def section(*arguments: str) -> Any:
    args = serve.build_parser().parse_args(["serve", "org/model", *arguments])
    serve.configure(args)
    return args.additional_config["fraqtl"]


def test_the_old_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert section("--no-kv-refinement")["residual"] is False
    assert capsys.readouterr().err.splitlines() == [
        "fraqtl-serve: --no-kv-refinement is now --no-kv-residual; the old name goes with the next version"
    ]
    assert section("--no-kv-residual")["residual"] is False
    assert "residual" not in section()
    assert capsys.readouterr().err == ""


def test_the_old_key(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert not config.read_config({"fraqtl": {"refinement": False}}).format.has_residual
    said = """--additional-config: 'refinement' in "fraqtl" is now 'residual'"""
    assert capsys.readouterr().err.splitlines() == [said]
    assert section("--additional-config", '{"fraqtl": {"refinement": false}}') == section("--no-kv-residual")
    with pytest.raises(ConfigError, match="'refinement' is the old name of 'residual' in \"fraqtl\": give one of them"):
        config.read_config({"fraqtl": {"refinement": False, "residual": False}})


def test_the_old_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        bench(["quantiser", "--model", "nowhere"])
    assert end.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "fraqtl-bench: quantiser is now quantizer"
    assert "no config.json there" in second


def test_a_calibration_file_of_another_version_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"model.layers.0.attn/key_centre": torch.zeros(2, 64)}
    metadata = {"key": "k", "checksum": files.checksum(tensors), "layers": json.dumps(["model.layers.0.attn"])}
    path = tmp_path / "old.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    files.logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger=files.logger.name)  # whatever a test before this one asked of vLLM's
    try:
        assert files.load(path, "k") is None
    finally:
        files.logger.removeHandler(caplog.handler)
    assert "was made by another version" in caplog.text
    with pytest.raises(ConfigError, match="is a calibration of another version"):
        read_constants(path, 1)
