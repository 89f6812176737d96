"""Offers to change the protocol, on uvicorn itself with a small application behind it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from websockets.sync.client import connect

from fraqtl_serve.http.upgrades import DeclinedUpgrades, DecliningProtocol
from tests.serve.raw_http import H2C, Answer, Connection, chunked

BODY = b'{"model": "m"}'
SIZED = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s==\r\n" % (
    b"A" * 22
)


async def echo(request: Request) -> JSONResponse:
    body = (await request.body()).decode()
    headers = {name: request.headers.getlist(name) for name in request.headers}
    return JSONResponse({"method": request.method, "url": str(request.url), "headers": headers, "body": body})


async def greet(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


@contextmanager
def serving(http: Any = "auto") -> Iterator[str]:
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"]), WebSocketRoute("/ws", greet)])
    app.add_middleware(DeclinedUpgrades)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="error"))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        app.state.server = server
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
        expected = (
            DecliningProtocol if server.config.http in ("auto", "httptools") else server.config.http_protocol_class
        )
        assert server.config.http_protocol_class is expected


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as url:
        yield url


def head(*headers: bytes, line: bytes = b"POST /v1/x?a=%20b HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: example.org", b"".join(headers)]) + b"\r\n"


def check(answer: Answer, body: bytes = BODY) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(answer.body)
    assert (answer.version, answer.status, said["body"]) == (11, 200, body.decode())
    return said


@pytest.mark.parametrize("http", ["httptools", "h11"])
@pytest.mark.parametrize(
    "offer", [H2C, H2C.replace(b"Upgrade", b"upgrade"), b"Upgrade: TLS/1.0\r\nConnection: upgrade\r\n"]
)
@pytest.mark.parametrize(("length", "sent"), [(SIZED, BODY), (CHUNKED, chunked(BODY[:3], BODY[3:]))])
def test_request_is_answered_with_its_body(http: str, offer: bytes, length: bytes, sent: bytes) -> None:
    with serving(http) as url, Connection(url) as connection:
        for _ in range(2):  # the connection stays as it was
            connection.send(head(offer, length), sent)
            said = check(connection.answer())
            assert (said["method"], said["url"]) == ("POST", "http://example.org/v1/x?a=%20b")


@pytest.mark.parametrize(("length", "sent"), [(SIZED, BODY), (CHUNKED, chunked(BODY[:3], BODY[3:]))])
def test_request_in_pieces(url: str, length: bytes, sent: bytes) -> None:
    whole = head(H2C, length) + sent
    with Connection(url) as connection:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(whole), 7):
            connection.send(whole[at : at + 7])
            time.sleep(0.001)
        check(connection.answer())


def test_long_body(url: str) -> None:
    body = b"x" * 3_000_000
    with Connection(url) as connection:
        connection.send(head(H2C, b"Content-Length: %d\r\n" % len(body)), body)
        check(connection.answer(), body)


def test_pipelined_requests(url: str) -> None:
    offering, plain = head(H2C, SIZED) + BODY, head(SIZED) + BODY
    with Connection(url) as connection:
        connection.send(offering + plain + offering + offering + plain)
        for _ in range(5):
            check(connection.answer())


def test_get_without_a_body(url: str) -> None:
    with Connection(url) as connection:
        for _ in range(2):
            connection.send(head(H2C, line=b"GET /health HTTP/1.1"))
            check(connection.answer("GET"), b"")


def test_only_the_offer_is_left_out(url: str) -> None:
    offer = b"Connection: close, Upgrade\r\nConnection: HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"
    with Connection(url) as connection:
        connection.send(head(offer, b"X-Twice: 1\r\nAuthorization: Bearer k\r\nX-Twice:  2\r\n", SIZED), BODY)
        answer = connection.answer()
        said = check(answer)
        assert answer.headers["connection"] == "close"
        assert connection.socket.recv(1) == b""
    assert said["headers"] == {
        "host": ["example.org"],
        "connection": ["close", ""],
        "x-twice": ["1", "2"],
        "authorization": ["Bearer k"],
        "content-length": [str(len(BODY))],
    }


def test_expectation_is_met(url: str) -> None:
    with Connection(url) as connection:
        connection.send(head(H2C, SIZED, b"Expect: 100-continue\r\n"))
        assert connection._file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert connection._file.readline() == b"\r\n"
        connection.send(BODY)
        check(connection.answer())


def test_post_is_no_websocket(url: str) -> None:
    with Connection(url) as connection:
        connection.send(head(WEBSOCKET, SIZED), BODY)
        check(connection.answer())


def test_websocket_goes_on(url: str) -> None:
    with connect(url.replace("http", "ws") + "/ws") as websocket:
        assert websocket.recv() == "hello"


def test_connect_ends(url: str) -> None:
    """It offers nothing that could be declined: it is answered as before, and the loop over offers ends."""
    with Connection(url) as connection:
        connection.send(b"CONNECT /x HTTP/1.1\r\nHost: example.org\r\n\r\n")
        assert connection.answer("CONNECT").status == 405


@pytest.mark.parametrize("wrong", [b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"Content-Length: -1\r\n"])
def test_what_is_no_request_stays_refused(url: str, wrong: bytes) -> None:
    with Connection(url) as connection:
        connection.send(head(H2C, wrong), b"abc")
        assert connection.answer().status == 400


def test_uvicorn_has_what_is_overridden() -> None:
    for name in ("on_message_begin", "on_headers_complete", "on_body", "on_message_complete", "_should_upgrade"):
        assert name in vars(HttpToolsProtocol)
