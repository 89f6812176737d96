"""Requests that go wrong: vLLM's own error reaches the client untouched, and the server goes on."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.e2e.reports import ANSWER, MODEL, check, messages, metric
from tests.e2e.server import Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MANY_TOKENS = 4000
ENDLESS = {"model": MODEL, "prompt": "my neighbour", "max_tokens": MANY_TOKENS, "ignore_eos": True}
HEADERS = {"content-type": "application/json"}
MANY = 3_000_000


def post(server: Server, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
    content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(server.url + path, headers=HEADERS, timeout=120, **content)


def the_message(response: httpx.Response) -> str:
    """The message of an error that has OpenAI's shape and nothing of ours."""
    assert not [name for name in response.headers if "fraqtl" in name]
    [(key, error)] = response.json().items()
    assert key == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return str(error["message"])


def check_alive(server: Server) -> None:
    answer = post(server, CHAT, {"model": MODEL, "messages": messages(), "temperature": 0}).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    check(answer["fraqtl"], tokens=answer["usage"]["total_tokens"] - 1, blocks=answer["fraqtl"]["blocks"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": messages()}), (COMPLETIONS, {"prompt": "a"})])
def test_unknown_model(demo_server: Server, path: str, prompt: dict[str, Any], stream: bool) -> None:
    response = post(demo_server, path, {"model": "nope", "stream": stream, **prompt})
    assert response.status_code == 404
    assert "nope" in the_message(response)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [(CHAT, {"messages": messages("apple " * 9000)}), (COMPLETIONS, {"prompt": [100] * 8193})],
    ids=["chat", "completions"],
)
def test_prompt_longer_than_the_context(demo_server: Server, path: str, prompt: dict[str, Any], stream: bool) -> None:
    response = post(demo_server, path, {"model": MODEL, "stream": stream, **prompt})
    assert response.status_code == 400
    assert "maximum context length is 8192" in the_message(response)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "body",
    [b"x" * MANY, b'{"include_usage"' + b"[" * MANY, b'{"model": "' + b"x" * MANY, b"[1, 2]", b"{}", b""],
    ids=["letters", "brackets", "cut off", "list", "empty object", "nothing"],
)
def test_garbage(demo_server: Server, path: str, body: bytes) -> None:
    response = post(demo_server, path, body)
    assert response.status_code == 400
    assert the_message(response)


@pytest.mark.parametrize("piece", [b"\xff", b"["], ids=["not UTF-8", "nested too deeply"])
def test_garbage_that_fastapi_refuses(demo_server: Server, piece: bytes) -> None:
    response = post(demo_server, CHAT, piece * MANY)
    assert response.status_code == 400
    assert the_message(response) == "There was an error parsing the body"
    check_alive(demo_server)


def test_paths_and_methods_that_do_not_exist(demo_server: Server) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("POST", "/nothing", 404), ("DELETE", CHAT, 405)):
        response = httpx.request(method, demo_server.url + path, timeout=60)
        assert response.status_code == status
        assert path in the_message(response)


@pytest.mark.parametrize("field", ["stream_options", "max_tokens", "temperature"])
def test_wrong_types(demo_server: Server, field: str) -> None:
    body = {"model": MODEL, "messages": messages(), "stream": True, field: ["include_usage"]}
    response = post(demo_server, CHAT, body)
    assert response.status_code == 400
    assert field in the_message(response)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_request(demo_server: Server, stream: bool) -> None:
    before = metric(demo_server.url, "vllm:generation_tokens_total")
    if stream:
        with httpx.stream("POST", demo_server.url + COMPLETIONS, json={**ENDLESS, "stream": True}, timeout=120) as r:
            assert next(r.iter_lines()).startswith("data: {")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(demo_server.url + COMPLETIONS, json=ENDLESS, timeout=httpx.Timeout(120, read=1))
    check_alive(demo_server)
    while metric(demo_server.url, "vllm:num_requests_running") > 0:
        time.sleep(0.1)
    assert metric(demo_server.url, "vllm:generation_tokens_total") - before < MANY_TOKENS
