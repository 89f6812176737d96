"""A live server with an API key, a limit on bodies, an allowed origin and tracing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.collector import ENVIRONMENT, Collector, collecting
from tests.e2e.reports import ANSWER, MODEL, messages
from tests.e2e.server import Server, forked

KEY = "sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ORIGIN = "https://example.org"
LIMIT = 1_000_000
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": messages(), "temperature": 0}
OPEN = {"/health", "/ping", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"} | {
    "/plugins/fraqtl",
    "/plugins/fraqtl/",
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(collector: Collector) -> Iterator[Server]:
    flags = ["--api-key", KEY, "--max-body-bytes", str(LIMIT), "--allowed-origins", f'["{ORIGIN}"]']
    with forked(*flags, "--otlp-traces-endpoint", collector.url, environment=ENVIRONMENT) as server:
        yield server


def the_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


def test_every_registered_route_without_the_key(server: Server) -> None:
    listed = re.findall(r"Route: (\S+), Methods: (.+)", server.log)
    assert len(listed) > 30
    answering = set()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, methods in listed:
            for method in methods.split(", "):
                response = client.request(method, re.sub(r"[{}]", "", path))
                if response.status_code != 401:
                    answering.add(path)
                elif method != "HEAD":
                    assert "Bearer KEY" in response.json()["error"]["message"]
    assert {path for path in answering if not path.startswith("/plugins/fraqtl/static/")} <= OPEN
    assert {"/health", "/metrics", "/version"} <= answering


def test_key_opens(server: Server) -> None:
    answer = httpx.post(server.url + CHAT, json=BODY, headers=HEADERS, timeout=120).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["fraqtl"]["bytes"] > 0
    for path in ("/invocations", "/tokenize"):
        given = {**BODY, "prompt": "hi"} if path == "/tokenize" else BODY
        assert httpx.post(server.url + path, json=given, timeout=60).status_code == 401
        assert httpx.post(server.url + path, json=given, headers=HEADERS, timeout=60).status_code == 200


def test_clients_say_that_the_key_is_wrong(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(anthropic.AuthenticationError, match="Bearer KEY") as caught:
        anthropic.Anthropic(base_url=server.url, auth_token="wrong", max_retries=0).messages.create(
            model=MODEL, max_tokens=3, messages=messages()
        )
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")


def test_the_key_of_anthropics_client(server: Server) -> None:
    def ask(key: str) -> Any:
        with anthropic.Anthropic(base_url=server.url, max_retries=0, timeout=120, api_key=key) as client:
            return client.messages.create(
                model=MODEL, max_tokens=30, messages=messages(), extra_body={"temperature": 0}
            )

    assert ask(KEY).content[0].text == ANSWER
    with pytest.raises(anthropic.AuthenticationError, match="x-api-key: KEY"):
        ask("wrong")


def test_the_key_in_either_header_and_no_wrong_one_beside_it(server: Server) -> None:
    """By hand, since some versions of Anthropic's client send one header and some the other."""

    def ask(**headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{server.url}/v1/messages", json={**BODY, "max_tokens": 30}, headers=named, timeout=120)

    for right in ({"x_api_key": KEY}, HEADERS, {"x_api_key": KEY, **HEADERS}):
        assert ask(**right).json()["content"][0]["text"] == ANSWER
    for wrong in (
        {"x_api_key": "no"},
        {"x_api_key": "no", **HEADERS},
        {"x_api_key": KEY, "Authorization": "Bearer no"},
    ):
        assert ask(**wrong).status_code == 401


def test_preflight(server: Server) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    for path in (CHAT, "/plugins/fraqtl/capacity"):
        response = httpx.options(server.url + path, headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN


def test_body_that_is_too_long(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100_000

    for content in (b" " * (LIMIT + 1), pieces()):  # the second one does not say its length
        headers = {**HEADERS, "content-type": "application/json"}
        response = httpx.post(server.url + CHAT, content=content, headers=headers, timeout=60)
        assert f"{LIMIT} bytes" in the_error(response, 413)["message"]
    long = messages("apple " * 10_000)
    assert (
        "maximum context length"
        in the_error(httpx.post(server.url + CHAT, json={**BODY, "messages": long}, headers=HEADERS, timeout=60), 400)[
            "message"
        ]
    )


def test_spans_carry_the_report(server: Server, collector: Collector) -> None:
    body = {
        "model": MODEL,
        "prompt": list(range(100, 140)),
        "n": 2,
        "max_tokens": 5,
        "ignore_eos": True,
        "temperature": 1,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=120).json()
    stopped = httpx.post(
        server.url + CHAT, json={**BODY, "stop": [" is"], "stream": True}, headers=HEADERS, timeout=120
    )
    events = [json.loads(line[6:]) for line in stopped.text.splitlines() if line.startswith("data: {")]
    both = collector.wait_for(answer["id"], 2)
    assert [span["fraqtl.tokens"] for span in both] == [44, 44]
    assert [span["fraqtl.blocks"] for span in both] == [3, 3]  # each for itself: the prompt's blocks are in both
    assert answer["fraqtl"]["blocks"] == 4
    [span] = collector.wait_for(events[0]["id"], 1)
    assert {key: value for key, value in span.items() if key.startswith("fraqtl.")} == {
        f"fraqtl.{key}": value for key, value in events[-1]["fraqtl"].items() if key != "version"
    }
