"""`--kv-budget`: formats are found for every layer once, and served."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import httpx
import pytest
from vllm.platforms import current_platform

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.formats import get_format
from fraqtl_serve.cli import layer_budget
from fraqtl_serve.cli.serve import DEMO_MODEL
from tests.e2e.reports import MODEL, messages
from tests.e2e.server import forked, group_members, remove_log, start

BITS = 4.0
HEAD_SIZE = 64


def formats_in(profile: Path) -> list[str]:
    return [layer["kv_format"] for layer in json.loads(profile.read_text())["layers"]]


def test_a_budget_is_searched_once_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with forked("--kv-budget", str(BITS)) as server:
        asked = {"model": MODEL, "messages": messages(), "max_tokens": 8}
        report = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()["fraqtl"]
        [profile] = (tmp_path / "fraqtl-serve" / "budget").glob("*/fraqtl-profile.json")
        found = formats_in(profile)
        assert set(report["kv_format"].split("+")) == set(found)
        log = server.log_file.read_text()
    assert "searching formats of single layers for 4 bits" in log
    sizes = [get_format(name).bytes_per_token(HEAD_SIZE) * 8 / (2 * HEAD_SIZE) for name in found]
    assert BITS - 0.5 < sum(sizes) / len(sizes) <= BITS

    [notes] = (tmp_path / "fraqtl-serve" / "budget").glob("*/notes.jsonl")
    measured = notes.read_text()
    smaller = formats_in(layer_budget.find_profile(str(DEMO_MODEL), 3.8, quiet=True))
    assert smaller != found
    more = notes.read_text().removeprefix(measured)
    assert "sensitivity" in measured and "sensitivity" not in more  # what the layers cost is measured once

    monkeypatch.setattr(layer_budget, "COMMAND", ("false",))  # a second search would fail
    assert layer_budget.find_profile(str(DEMO_MODEL), BITS, quiet=True) == profile
    with pytest.raises(ConfigError, match=r"--kv-budget 5: the search ended with code 1"):
        layer_budget.find_profile(str(DEMO_MODEL), 5, quiet=True)


def test_a_stop_ends_the_search(tmp_path: Path) -> None:
    server = start("--kv-budget", "4", environment={"XDG_CACHE_HOME": str(tmp_path)})
    while "searching formats" not in server.log or len(group_members(server)) < 2:
        assert server.process.poll() is None, server.log
        time.sleep(0.1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 128 + signal.SIGTERM
    assert server.log.splitlines()[-1] == "fraqtl-serve: stopped by SIGTERM while it started"
    assert group_members(server) == []
    remove_log(server)


def test_the_labs_sentence_is_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^--kv-budget 1.5: a budget of 1.5 bits per dimension is below"):
        layer_budget.find_profile(str(DEMO_MODEL), 1.5, quiet=True)
    assert not list(tmp_path.rglob("fraqtl-profile.json"))


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        (["linear_attention", "full_attention"], "formats of single layers in hybrid models yet"),
        (
            ["sliding_attention", "full_attention"],
            "formats of single layers in models with windows on some layers",
        ),
    ],
)
def test_what_the_engine_would_refuse_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: list[str], sentence: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unknown", "layer_types": kinds}))
    with pytest.raises(UnsupportedError, match=sentence):
        layer_budget.find_profile(str(tmp_path), BITS, quiet=True)


def test_searches_on_a_gpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(UnsupportedError, match=r"searched on a CPU only yet: give --kv-profile the file that fraqtl-"):
        layer_budget.find_profile(str(DEMO_MODEL), BITS, quiet=True)
