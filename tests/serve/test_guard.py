"""The API key on vLLM's own application, route by route."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fraqtl_serve.guard import KeyGuard, is_open
from tests.serve.small_app import Answer, make_scope, messages
from tests.serve.vllm_app import KEY, WITH_KEY, client_of, every_route, make_app

# What answers without the key; the documentation lists the same.
OPEN = {"/health", "/ping", "/version", "/metrics", "/metrics/", "/docs", "/docs/oauth2-redirect", "/redoc"} | {
    "/openapi.json"
}
MUST_BE_CLOSED = {
    "/invocations",
    "/generative_scoring",
    "/tokenize",
    "/detokenize",
    "/load",
    "/kv_event_sources",
    "/scale_elastic_ep",
    "/v1/models",
    "/v1/chat/completions",
    "/inference/v1/generate",
    "/plugins/fraqtl/capacity",
    "/plugins/fraqtl/requests",
    "/plugins/fraqtl/requests/request_id",
    "/plugins/fraqtl/history",
}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    return make_app(monkeypatch, "--api-key", KEY)


def is_refused(response: Any) -> bool:
    if response.status_code != 401:
        return False
    assert response.headers["www-authenticate"] == "Bearer"
    if response.request.method != "HEAD":
        assert response.json()["error"]["message"] == "this server needs its API key: Authorization: Bearer KEY"
    return True


@pytest.mark.parametrize("dev_mode", [False, True])
def test_every_route_without_the_key(monkeypatch: pytest.MonkeyPatch, dev_mode: bool) -> None:
    if dev_mode:  # adds routes that run any method of the engine
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    app = make_app(monkeypatch, "--api-key", KEY, "--enable-offline-docs")
    client, routes = client_of(app), every_route(app)
    answering = {path for method, path in routes if not is_refused(client.request(method, path))}
    closed = {path for _, path in routes} - answering
    ours = {"/plugins/fraqtl", "/plugins/fraqtl/"}  # the page, which asks for the key itself
    assert answering - {path for path in answering if path.startswith(("/static/", "/plugins/fraqtl/static/"))} <= (
        OPEN | ours
    )
    assert closed >= MUST_BE_CLOSED
    assert ("/collective_rpc" in closed) == dev_mode


def test_models_that_generate_nothing_are_guarded_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(monkeypatch, "--api-key", KEY, "--max-body-bytes", "1000", tasks=("embed", "token_embed"))
    client = client_of(app)
    assert "/v1/completions" not in {path for _, path in every_route(app)}
    assert is_refused(client.post("/invocations", json={}))
    assert client.post("/invocations", content=b" " * 1001, headers=WITH_KEY).status_code == 413
    assert client.get("/plugins/fraqtl/capacity", headers=WITH_KEY).status_code == 503


def test_no_key_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app = make_app(monkeypatch, "--api-key", "")  # an empty key is none
    client = client_of(app)
    assert not any(is_refused(client.request(method, path)) for method, path in every_route(app))


@pytest.mark.parametrize("where", ["command line", "environment"])
@pytest.mark.parametrize("path", ["/load", "/v1/nothing", "/nothing"])
def test_key_is_asked_for(monkeypatch: pytest.MonkeyPatch, path: str, where: str) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of no account then" if where == "command line" else KEY)
    flags = ("--api-key", "other", KEY) if where == "command line" else ()
    client = client_of(make_app(monkeypatch, *flags))
    for given in (f"Bearer {KEY}", f"bearer {KEY}"):
        assert client.get(path, headers={"Authorization": given}).status_code != 401
    for wrong in (
        None,
        KEY,
        "Bearer ",
        "Bearer",
        f"Basic {KEY}",
        "Bearer sesam",
        "Bearer of no account then",
        "Bearer é",
    ):
        assert is_refused(client.get(path, headers={} if wrong is None else {"Authorization": wrong.encode()})), wrong


@pytest.mark.parametrize(
    "path", ["//load", "/health/../load", "/metrics/../load", "/metricsx", "/Health/", "/static", "/%2fload", "/docs/x"]
)
def test_paths_that_look_open_are_closed(app: FastAPI, path: str) -> None:
    answer = Answer()
    scope = make_scope(path, "GET", app=app, headers=[])
    asyncio.run(app(scope, messages(b""), answer.send))
    assert answer.status == 401 or (path.startswith("/metrics/") and b"vllm" not in answer.body), answer.body


def test_path_below_a_root_path(monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(make_app(monkeypatch, "--api-key", KEY, "--root-path", "/health"))
    assert is_refused(client.get("/health/load"))
    assert is_refused(client.get("/load"))
    assert client.get("/health/version").status_code == 200


ORIGIN = "https://example.org"


@pytest.fixture
def app_for_browsers(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    return make_app(monkeypatch, "--api-key", KEY, "--allowed-origins", f'["{ORIGIN}"]')


def test_preflight(app_for_browsers: FastAPI) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    for path in ("/v1/chat/completions", "/plugins/fraqtl/capacity", "/invocations"):
        response = client_of(app_for_browsers).options(
            path, headers={**headers, "Access-Control-Request-Headers": "authorization,content-type"}
        )
        assert response.status_code == 200, path
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in response.headers["access-control-allow-headers"].lower()


def test_browsers_may_read_why_our_routes_refuse(app_for_browsers: FastAPI) -> None:
    response = client_of(app_for_browsers).get("/plugins/fraqtl/capacity", headers={"Origin": ORIGIN})
    assert is_refused(response)
    assert response.headers["access-control-allow-origin"] == ORIGIN


def test_plain_options_is_no_way_in(app: FastAPI) -> None:
    assert is_refused(client_of(app).options("/v1/chat/completions"))


def test_websocket_needs_the_key() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})

    client = TestClient(KeyGuard(application, keys=[KEY]))  # type: ignore[arg-type]
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass
    with client.websocket_connect("/v1/realtime", headers=dict(WITH_KEY)):
        pass


def test_what_is_open() -> None:
    assert all(map(is_open, OPEN))
    assert not any(map(is_open, MUST_BE_CLOSED))
