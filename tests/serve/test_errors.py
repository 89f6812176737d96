"""The shape of errors: OpenAI's on vLLM's own application, Anthropic's on /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fraqtl_serve.http.errors import NEEDS_KEY, ErrorShape
from tests.serve.vllm_app import KEY, WITH_KEY, client_of, every_route, make_app

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ASKED = {"method": "POST", "json": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return make_app(monkeypatch, "--max-body-bytes", "1000")


def openai_error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == str(len(response.content))
    [(key, error)] = response.json().items()
    assert key == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"] and error["type"]
    return dict(error)


def anthropic_error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    payload = response.json()
    assert payload.keys() == {"type", "error"}
    assert payload["type"] == "error"
    assert payload["error"].keys() == {"type", "message"}
    return dict(payload["error"])


def test_vllms_own_refusals(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(app)
    assert openai_error(client.get("/nothing"), 404)["message"] == "no route /nothing: GET /openapi.json lists them"
    wrong_method = client.get(CHAT)
    assert "doesn't take GET" in openai_error(wrong_method, 405)["message"]
    assert wrong_method.headers["allow"] == "POST"
    assert openai_error(client.post(CHAT, json=[1]), 400)["param"] == "body"
    text = openai_error(client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 400)
    assert "application/json" in text["message"]
    garbage = client.post(CHAT, content=b"\xff", headers={"content-type": "application/json"})
    assert openai_error(garbage, 400)["message"] == "There was an error parsing the body"
    assert "1000 bytes" in openai_error(client.post(CHAT, json="x" * 1000), 413)["message"]
    with_key = client_of(make_app(monkeypatch, "--api-key", KEY))
    unauthorized = with_key.get("/v1/models")
    assert "Bearer KEY" in openai_error(unauthorized, 401)["message"]
    assert unauthorized.headers["www-authenticate"] == "Bearer"


def test_errors_of_the_anthropic_route(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(app)
    assert anthropic_error(client.post(MESSAGES, json={}), 400)["type"] == "invalid_request_error"
    assert anthropic_error(client.get(MESSAGES), 405)["type"] == "invalid_request_error"
    assert anthropic_error(client.post(MESSAGES, json="x" * 1000), 413)["type"] == "request_too_large"
    with_key = client_of(make_app(monkeypatch, "--api-key", KEY))
    assert anthropic_error(with_key.post(MESSAGES, json={}), 401)["type"] == "authentication_error"


@pytest.mark.parametrize("key", [None, WITH_KEY])
def test_every_route_with_nothing_and_with_garbage(monkeypatch: pytest.MonkeyPatch, key: dict[str, str] | None) -> None:
    app = make_app(monkeypatch, "--api-key", KEY)  # no engine: what gets past its checks ends in 500
    client = client_of(app)
    seen = set()
    for method, path in every_route(app):
        for content in (b"", b"{", b'{"model": 3}'):
            response = client.request(
                method, path, content=content, headers={"content-type": "application/json", **(key or {})}
            )
            seen.add(response.status_code)
            if response.status_code < 400 or method == "HEAD" or path.startswith(("/health", "/ping", "/metrics")):
                continue
            check = anthropic_error if path.startswith(MESSAGES) and response.status_code != 500 else openai_error
            check(response, response.status_code)
    assert seen >= ({401} if key is None else {400, 500})


# ---- a small application


def small(respond: Callable[[], Response]) -> TestClient:
    async def handle(request: Request) -> Response:
        return respond()

    paths = (CHAT, MESSAGES, "/health", "/metrics")
    app = Starlette(routes=[Route(path, handle, methods=["GET", "POST"]) for path in paths])
    app.add_middleware(ErrorShape)
    return TestClient(app)


OPENAI = {"error": {"message": "no", "type": "BadRequestError", "param": "n", "code": 400}}
ANTHROPIC = {"type": "error", "error": {"type": "not_found_error", "message": "no"}}


@pytest.mark.parametrize(
    ("body", "status", "message", "kind", "param"),
    [
        (OPENAI, 400, "no", "BadRequestError", "n"),
        ({"error": "Unauthorized"}, 401, NEEDS_KEY, None, None),
        ({"detail": "Not Found"}, 404, f"no route {CHAT}: GET /openapi.json lists them", None, None),
        ({"detail": "the request abc"}, 404, "the request abc", None, None),
        ({"detail": [{"loc": ["body", "n"], "msg": "too big"}]}, 422, "body.n: too big", None, "body.n"),
        ({"message": "wait"}, 429, "wait", "Too Many Requests", None),
        ({"error": {"message": "full", "type": "ServiceUnavailable"}}, 503, "full", "ServiceUnavailable", None),
        ({"error": {"code": 7}}, 500, "Internal Server Error", None, None),
        ({"detail": None}, 503, "Service Unavailable", None, None),
        ([1], 400, "[1]", None, None),
        ({}, 413, "Request Entity Too Large", None, None),
    ],
)
def test_openais_shape(body: Any, status: int, message: str, kind: str | None, param: str | None) -> None:
    error = openai_error(small(lambda: JSONResponse(body, status)).post(CHAT), status)
    assert (error["message"], error["param"]) == (message, param)
    assert kind in (None, error["type"])


def test_right_shapes_pass_byte_for_byte() -> None:
    for path, payload in ((CHAT, OPENAI), (MESSAGES, ANTHROPIC)):
        body = json.dumps(payload, indent=3).encode()
        response = small(lambda body=body: Response(body, 400, media_type="application/json")).post(path)
        assert response.content == body


def test_anthropics_shape_of_openais() -> None:
    error = anthropic_error(small(lambda: JSONResponse(OPENAI, 503)).post(MESSAGES), 503)
    assert error == {"type": "overloaded_error", "message": "no"}


def test_vllms_names_in_anthropics_shape() -> None:
    said = {"type": "error", "error": {"type": "BadRequestError", "message": "no"}}
    error = anthropic_error(small(lambda: JSONResponse(said, 400)).post(MESSAGES), 400)
    assert error == {"type": "invalid_request_error", "message": "no"}


def test_text_becomes_a_message_and_headers_stay() -> None:
    headers = {"retry-after": "3", "www-authenticate": 'Bearer realm="x"', "x-request-id": "7"}
    response = small(lambda: PlainTextResponse("slow down", 401, headers)).post(CHAT)
    assert openai_error(response, 401)["message"] == "slow down"
    assert headers.items() <= dict(response.headers).items()
    assert response.headers.get_list("www-authenticate") == ['Bearer realm="x"']


def test_error_in_pieces() -> None:
    async def pieces() -> Any:
        yield b'{"det'
        yield b'ail": "no"}'

    response = small(lambda: StreamingResponse(pieces(), 400, media_type="application/json")).post(CHAT)
    assert openai_error(response, 400)["message"] == "no"


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_keep_their_own_answers(path: str) -> None:
    assert small(lambda: Response(status_code=503)).get(path).content == b""


def test_head_has_no_body() -> None:
    response = small(lambda: JSONResponse({"detail": "no"}, 404)).head(CHAT)
    assert (response.status_code, response.content) == (404, b"")


def test_good_answers_pass() -> None:
    body = b'{"detail": "Not Found",  "error": "Unauthorized"}'
    response = small(lambda: Response(body, 200, media_type="application/json")).post(CHAT)
    assert (response.content, response.headers["content-length"]) == (body, str(len(body)))
