"""A twentieth of the fuzz that `python -m tests.e2e.fuzz` runs in full, and schemathesis over our own routes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.fuzz import FLAGS, problems, run
from tests.e2e.reports import ANSWER, MODEL, messages
from tests.e2e.server import Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of its own: what else runs on a shared one would be counted."""
    with running(*FLAGS) as server:
        yield server


def test_our_routes_answer_as_their_schema_says(server: Server, tmp_path: Path) -> None:
    """By its command: schemathesis's plugin for pytest does not know this pytest yet."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    command += ["--include-path-regex", "^/plugins/fraqtl", "--max-examples", "30", "--seed", "1"]
    command += ["--generation-database", "none", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "4 selected" in done.stdout
    [(generated, passed)] = re.findall(r"(\d+) generated, (\d+) passed", done.stdout)
    assert int(generated) == int(passed) > 100


def test_100_requests_that_no_client_should_send(server: Server) -> None:
    result = run(server, requests=100, seed=1)
    assert problems(result) == []
    assert result["requests"] == 400
    assert {"200", "400", "client hung up"} <= result["answers"].keys()
    body = {"model": MODEL, "messages": messages(), "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
