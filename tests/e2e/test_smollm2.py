"""A real chat model, served by its name: what a start prints, and what clients of OpenAI's get."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator

import pytest
from openai import OpenAI

from fraqtl_serve.cli import smollm2
from tests.e2e.server import Server, running

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.MODULE) is None or importlib.util.find_spec("gguf") is None,
    reason=f"SmolLM2's package is not installed: {smollm2.INSTALL}",
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}}
FORCED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("smollm2", log_level=None) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_what_the_start_prints(server: Server) -> None:
    end = time.monotonic() + 10
    while "curl" not in server.log and time.monotonic() < end:  # the block comes once the server has answered itself
        time.sleep(0.1)
    lines = server.log.splitlines()
    assert not [line for line in lines if "ERROR" in line or "WARNING" in line or "Traceback" in line]
    assert len(lines) < 25, server.log
    assert f"curl {server.url}/v1/chat/completions" in server.log
    assert f"{server.url}/plugins/fraqtl/" in server.log


def test_answer_with_its_receipt(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=32)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")
    receipt = answer.fraqtl  # type: ignore[attr-defined]
    assert receipt["kv_format"] == "k4v4" and receipt["ratio"] > 3.7


def test_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=32,
        stream=True,
    )
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_schema(client: OpenAI) -> None:
    schema = {**PARAMETERS, "additionalProperties": False}
    answer = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=48,
        response_format={"type": "json_schema", "json_schema": {"name": "capital", "schema": schema, "strict": True}},
    )
    assert list(json.loads(answer.choices[0].message.content or "")) == ["city"]


@pytest.mark.parametrize("choice", [FORCED, "required"], ids=["named", "required"])
def test_forced_tool_call(client: OpenAI, choice: object) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        temperature=0,
        max_tokens=128,
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice=choice,  # type: ignore[arg-type]
        parallel_tool_calls=False,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)
