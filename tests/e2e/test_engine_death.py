"""The engine's process is killed while a client reads its stream."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx

from tests.e2e.reports import MODEL
from tests.e2e.server import Server, group_members, running

ENDLESS = {"model": MODEL, "prompt": "my neighbour", "max_tokens": 8000, "ignore_eos": True}
SAID = "EngineCore encountered an issue"
SECONDS = 30  # vLLM looks every five seconds if its engine is alive


def engine_of(server: Server) -> int:
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in group_members(server)}
    [pid] = [pid for pid, name in names.items() if b"EngineCore" in name]
    return pid


def test_engine_that_is_killed_while_a_client_reads() -> None:
    with running() as server:
        url = f"{server.url}/v1/completions"
        waiting: list[httpx.Response] = []
        other = threading.Thread(target=lambda: waiting.append(httpx.post(url, json=ENDLESS, timeout=SECONDS)))
        other.start()
        with httpx.stream("POST", url, json={**ENDLESS, "stream": True}, timeout=SECONDS) as response:
            lines = (line for line in response.iter_lines() if line)
            for _ in range(5):
                next(lines)
            os.kill(engine_of(server), signal.SIGKILL)
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert SAID in error["message"]
        assert error.keys() == {"message", "type", "param", "code"}

        health = []
        end = time.monotonic() + SECONDS
        while server.process.poll() is None and time.monotonic() < end:
            try:
                health.append(httpx.get(f"{server.url}/health", timeout=5).status_code)
            except httpx.TransportError:
                break  # it has stopped listening
            time.sleep(0.02)
        assert set(health) <= {503}
        other.join(SECONDS)
        [answer] = waiting
        assert answer.status_code == 500
        assert SAID in answer.json()["error"]["message"]
        server.process.wait(SECONDS)  # without VLLM_KEEP_ALIVE_ON_ENGINE_DEATH the server ends itself
        while group_members(server):
            assert time.monotonic() < end + SECONDS, "a process of the server's stayed behind"
            time.sleep(0.1)


def test_server_that_is_told_to_outlive_its_engine_says_that_it_is_ill() -> None:
    with running(environment={"VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1"}) as server:
        os.kill(engine_of(server), signal.SIGKILL)
        end = time.monotonic() + SECONDS
        while httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
            assert time.monotonic() < end, "/health never noticed"
            time.sleep(0.05)
        response = httpx.post(f"{server.url}/v1/completions", json=ENDLESS, timeout=SECONDS)
        assert response.status_code == 500
        assert SAID in response.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health", timeout=5).status_code == 503
