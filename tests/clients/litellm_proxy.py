"""LiteLLM's proxy between the openai package and the server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from openai import OpenAI

from tests.clients.seen import ANSWER, MODEL, QUESTION, places, tell

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
RESPONSE: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 30}
WHOLE = ["fraqtl", "usage.kv_cache"]
HEADERS = ["llm_provider-x-fraqtl-kv-bytes", "llm_provider-x-fraqtl-kv-saved-bytes"]
KEY = "sk-for-this-run-only-5c1f"


@contextmanager
def proxy(url: str) -> Iterator[OpenAI]:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, config = free.getsockname()[1], Path(folder, "config.yaml")
        free.close()
        parameters = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": parameters}]}))
        program = str(Path(sys.executable).parent / "litellm")
        command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, "LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
        try:
            wait(f"http://127.0.0.1:{port}/health/liveliness", process)
            with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
                yield client
        finally:
            process.kill()  # a polite end waits for work in the background
            process.wait()


def wait(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        assert process.poll() is None, "the proxy ended"
        try:
            urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(address)


def check(client: Any, url: str) -> dict[str, list[str]]:
    raw = client.chat.completions.with_raw_response.create(**ASK)
    answer = raw.parse()
    plain = places(answer) + places(dict(raw.headers))
    assert answer.choices[0].message.content == ANSWER and plain == WHOLE + HEADERS, plain
    for extra in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(client.chat.completions.create(stream=True, **extra, **ASK))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
        assert places(chunks) == [], places(chunks)
        # The id is ours: the server itself still has the report.
        with urlopen(f"{url}/plugins/fraqtl/requests/{chunks[0].id}") as kept:
            assert json.load(kept)["report"]["blocks"] == 3
    assert places(client.responses.create(**RESPONSE)) == WHOLE
    events = list(client.responses.create(stream=True, **RESPONSE))
    assert places(events[-1]) == [f"response.{place}" for place in WHOLE], places(events)
    return {"plain": plain, "stream": places(chunks), "responses_stream": places(events)}


def main(url: str) -> None:
    with proxy(url) as client:
        tell("litellm", **check(client, url))


main(sys.argv[1])
