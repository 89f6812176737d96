"""What users see of a start, and what is left of a server that is killed."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from fraqtl_serve.cli.banner import DEMO_QUESTION
from tests.e2e.server import Server, group_members, remove_log, running, start, stop, wait_until_ready

QUESTION = {
    "model": "fraqtl-demo",
    "messages": [{"role": "user", "content": DEMO_QUESTION}],
    "temperature": 0,
    "max_tokens": 40,
}


def answer(server: Server) -> str:
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=QUESTION, timeout=120).raise_for_status().json()
    text: str = reply["choices"][0]["message"]["content"]
    return text


def said_at_last(server: Server) -> str:
    """The log, once the last block is there: it comes after the first answer to the server itself."""
    end = time.monotonic() + 20
    while "ask it" not in server.log and time.monotonic() < end:
        time.sleep(0.1)
    return server.log


def test_a_few_lines_and_what_is_served() -> None:
    with running(log_level=None) as server:
        log = said_at_last(server)
        lines = log.splitlines()
        assert not [line for line in lines if "ERROR" in line or "WARN" in line or "Warning" in line], log
        assert len(lines) < 25, log
        steps = [line.split("] ", 1)[1] for line in lines if line.startswith("[")]
        assert steps[0].endswith("importing vLLM") and steps[-1] == "ready"
        assert "loading the model" in steps
        assert f"{server.url}/plugins/fraqtl/" in log and f"curl {server.url}/v1/chat/completions" in log
        first = answer(server)
    with running("--quiet", log_level=None) as server:
        assert answer(server) == first
        assert not [line for line in server.log.splitlines() if not line.startswith("INFO:")], server.log


def test_vllms_own_level_brings_its_log_back() -> None:
    with running(environment={"VLLM_LOGGING_LEVEL": "INFO"}) as server:
        assert "Available routes are:" in server.log and "Enforce eager set" in server.log


@pytest.mark.parametrize("serves", [False, True], ids=["it starts", "it serves"])
def test_a_server_that_is_killed_leaves_no_process(serves: bool) -> None:
    server = start(log_level=None)
    try:
        if serves:
            wait_until_ready(server)
        else:
            time.sleep(2)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        end = time.monotonic() + 60
        while group_members(server) and time.monotonic() < end:
            time.sleep(0.2)
        assert group_members(server) == []
    finally:
        stop(server)
        remove_log(server)
