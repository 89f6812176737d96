"""The API key on vLLM's own application, route by route."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette._utils import get_route_path
from starlette.websockets import WebSocketDisconnect

from fraqtl_serve.http.asgi import route_path
from fraqtl_serve.http.errors import NEEDS_KEY
from fraqtl_serve.http.guard import KeyGuard, is_open
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
        assert response.json()["error"]["message"] == NEEDS_KEY
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


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/models", "/load", "/plugins/fraqtl/requests"])
@pytest.mark.parametrize("root_path", ["", "/", "/v"])
def test_key_in_either_header(monkeypatch: pytest.MonkeyPatch, path: str, root_path: str) -> None:
    client = client_of(
        make_app(monkeypatch, "--api-key", "other", KEY, *(["--root-path", root_path] * bool(root_path)))
    )

    def refused(*headers: tuple[str, str]) -> bool:
        return is_refused(client.get(path, headers=list(headers)))

    bearer, x = ("Authorization", f"Bearer {KEY}"), ("x-api-key", KEY)
    wrong, wrong_x = ("Authorization", "Bearer wrong"), ("X-Api-Key", "wrong")
    for right in ([bearer], [x], [bearer, x], [x, ("authorization", "Bearer other")], [bearer, ("x-api-key", "")]):
        assert not refused(*right), right
    assert not refused(("Authorization", ""), x)
    for rescued in ([wrong, x], [bearer, wrong_x], [x, wrong_x], [wrong_x, x], [bearer, wrong], [wrong, bearer]):
        assert refused(*rescued), rescued
    for other in (
        [wrong_x],
        [("x-api-key", f"Bearer {KEY}")],
        [("x-api-key", "")],
        [("Authorization", f"Basic {KEY}"), x],
    ):
        assert refused(*other), other


@pytest.mark.parametrize(
    "path", ["//load", "/health/../load", "/metrics/../load", "/metricsx", "/Health/", "/static", "/%2fload", "/docs/x"]
)
def test_paths_that_look_open_are_closed(app: FastAPI, path: str) -> None:
    answer = Answer()
    scope = make_scope(path, "GET", app=app, headers=[])
    asyncio.run(app(scope, messages(b""), answer.send))
    assert answer.status == 401 or (path.startswith("/metrics/") and b"vllm" not in answer.body), answer.body


@pytest.mark.parametrize("root_path", ["/", "/v", "/v1", "/health", "/api/fraqtl", "/metrics"])
def test_health_never_needs_the_key(monkeypatch: pytest.MonkeyPatch, root_path: str) -> None:
    """At the addresses at which vLLM has it, with the prefix and without."""
    app = make_app(monkeypatch, "--api-key", KEY, "--root-path", root_path)
    client = client_of(app)
    for path in ("/version", f"{root_path.rstrip('/')}/version"):
        assert not is_refused(client.get(path)), path
    for path in ("/load", "/v1/models", f"{root_path.rstrip('/')}/load", f"{root_path.rstrip('/')}/v1/models"):
        assert is_refused(client.get(path)), path


@pytest.mark.parametrize("root_path", ["", "/", "/v", "/v/", "/v1", "/v1/", "/health", "/a/b"])
@pytest.mark.parametrize(
    "path", ["/", "/v", "/v/", "/v1/models", "/v/v1/models", "//load", "/health", "/a/b", "/a/bc/d"]
)
def test_prefix_is_cut_as_the_router_cuts_it(root_path: str, path: str) -> None:
    scope = {"path": path, "root_path": root_path}
    assert route_path(scope) == get_route_path(scope)


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
