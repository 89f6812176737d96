"""A small Starlette application under the middleware, and a client that sees every ASGI message."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fraqtl_serve.engine.accounting import Accounting
from fraqtl_serve.http.report_middleware import LAST_EVENT, ReportMiddleware
from fraqtl_serve.reports.report import Ledger
from tests.serve.fake_engine import FakeEngine, account

CHAT = "/v1/chat/completions"
# Two sequences of one request, which share block 1.
ACCOUNTS = (account([1, 2], tokens=20), account([1, 3], tokens=22))


def compact(payload: Any) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass
class Answer:
    """What the middleware sent, message by message."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.bodies)

    @property
    def json(self) -> dict[str, Any]:
        payload: dict[str, Any] = json.loads(self.body)
        return payload

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            assert len(self.headers) == len(message["headers"])  # none is there twice
        else:
            self.bodies.append(message.get("body", b""))


class OpenedAccounting(Accounting):
    """Keeps all ledgers that were opened."""

    def __init__(self, kv_format: str) -> None:
        super().__init__(kv_format)
        self.opened: list[Ledger] = []

    def open(self, endpoint: str = "") -> Ledger:
        self.opened.append(super().open(endpoint))
        return self.opened[-1]

    @property
    def still_open(self) -> list[Ledger]:
        return [ledger for ledger in self.opened if not ledger.closed]


def make_app(respond: Callable[[], Response], *, in_body: bool = True, in_usage: bool = True, **args: Any) -> Starlette:
    """vLLM's application in small: every route runs the engine, then answers with `respond()`."""

    async def handle(request: Request) -> Response:
        body = json.loads(await request.body())
        async for _ in request.app.state.engine.generate("hi", SimpleNamespace(n=body.get("n", 1)), "chatcmpl-1"):
            pass
        return respond()

    paths = (*LAST_EVENT, "/v1/messages/count_tokens", "/v1/embeddings", "/v1/models")
    app = Starlette(routes=[Route(path, handle, methods=["GET", "POST"]) for path in paths])
    app.add_middleware(ReportMiddleware, in_body=in_body, in_usage=in_usage)
    app.state.args = Namespace(**args)
    app.state.engine = FakeEngine(*ACCOUNTS)
    app.state.fraqtl_accounting = OpenedAccounting("k4v4")
    app.state.fraqtl_accounting.watch(app.state.engine)
    return app


def make_scope(path: str = CHAT, method: str = "POST", **scope: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        **scope,
    }


async def never() -> Any:
    await asyncio.Event().wait()


def messages(*bodies: bytes) -> Callable[[], Any]:
    """A `receive` that gives the request's body in these pieces, and then hears nothing more."""
    rest = iter([{"type": "http.request", "body": b, "more_body": b is not bodies[-1]} for b in bodies])

    async def receive() -> Any:
        return next(rest, None) or await never()

    return receive


def ask(app: Starlette, request: dict[str, Any] | None = None, path: str = CHAT, method: str = "POST") -> Answer:
    answer = Answer()
    asyncio.run(app(make_scope(path, method), messages(compact(request or {})), answer.send))
    assert app.state.fraqtl_accounting.still_open == []
    return answer
