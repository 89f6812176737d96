"""The Vercel AI SDK, run by node against a live server. Skipped where npm can't fetch it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.reports import ANSWER, MODEL, QUESTION, check, check_mirror
from tests.e2e.server import Server

FOLDER = Path(__file__).parent / "ai_sdk"
SECONDS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client and its packages."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm aren't installed")
    folder = tmp_path_factory.mktemp("ai_sdk")
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm fetched nothing in {SECONDS} s")
    if done.returncode != 0:
        pytest.skip(f"npm can't fetch the packages: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path, demo_server: Server) -> dict[str, Any]:
    command = ["node", "client.mjs", f"{demo_server.url}/v1", MODEL, QUESTION]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_warning(answers: dict[str, Any]) -> None:
    assert answers["warnings"] == []


@pytest.mark.parametrize("usage", ["without_usage", "with_usage"])
def test_plain(answers: dict[str, Any], usage: str) -> None:
    plain = answers[usage]["plain"]
    assert (plain["text"], plain["finish"]) == (ANSWER, "stop")
    report = plain["body"]["fraqtl"]
    tokens = plain["usage"]["totalTokens"] - 1
    check(report, tokens=tokens, blocks=-(-tokens // 16))
    check_mirror(plain["usage"]["raw"]["kv_cache"], report)
    assert plain["headers"]["x-fraqtl-kv-bytes"] == str(report["bytes"])
    assert plain["headers"]["x-fraqtl-kv-saved-bytes"] == str(report["saved_bytes"])


@pytest.mark.parametrize("usage", ["without_usage", "with_usage"])
def test_stream(answers: dict[str, Any], usage: str) -> None:
    stream = answers[usage]["stream"]
    assert (stream["text"], stream["finish"], stream["errors"]) == (ANSWER, "stop", [])
    [report] = stream["raw"]
    tokens = answers[usage]["plain"]["usage"]["totalTokens"] - 1
    check(report, tokens=tokens, blocks=-(-tokens // 16))
    if usage == "with_usage":
        assert stream["usage"]["totalTokens"] - 1 == tokens
        check_mirror(stream["usage"]["raw"]["kv_cache"], report)
    else:
        assert "totalTokens" not in stream["usage"]
