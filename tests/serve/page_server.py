"""The plugin's routes behind a real HTTP server, with figures made up for the page and no engine."""

from __future__ import annotations

import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from fraqtl_serve.http.guard import KeyGuard
from fraqtl_serve.http.routes import router
from fraqtl_serve.page import router as page_router
from fraqtl_serve.reports.capacity import Load
from fraqtl_serve.reports.history import SECONDS, History
from fraqtl_serve.reports.records import Records, RequestRecord
from fraqtl_serve.reports.report import Ledger
from tests.serve.fake_engine import account
from tests.serve.pools import pool

MODEL = "a-model"
POOL = pool("bfloat16")
NASTY = '<img src=x onerror="document.title=1">'
LONG = "chatcmpl-" + 120 * "0"


def record(request_id: str, blocks: int, when: float, **other: Any) -> RequestRecord:
    report = Ledger("k4v4", accounts={"a": account(list(range(blocks)), tokens=16 * blocks)}).report()
    given = {"endpoint": "/v1/chat/completions", "status": "finished", "report": report, **other}
    return RequestRecord(id=request_id, time=when, **given)


def make_app(keys: list[str], now: float) -> FastAPI:
    app = FastAPI()
    init_exception_handler(app)
    app.include_router(router)
    app.include_router(page_router)
    app.get("/v1/models")(lambda: {"data": [{"id": MODEL}]})
    if keys:
        app.add_middleware(KeyGuard, keys=keys)
    app.state.args = Namespace(api_key=keys, log_error_stack=False)
    app.state.fraqtl_pool, app.state.fraqtl_history, app.state.fraqtl_records = POOL, History(), Records()
    for step in range(120):  # the last four minutes: up, and down again
        app.state.fraqtl_history.add(now - SECONDS * (119 - step), (60 - abs(60 - step)) / 100)
    for made in (
        record("cmpl-aborted", 900, now - 4, status="aborted", endpoint="/v1/completions"),
        record("cmpl-silent", 1, now - 3, report=None),
        record(NASTY, 3, now - 2),
        record(LONG, 2, now - 1),
    ):
        app.state.fraqtl_records.add(made)
    return app


class PageServer:
    """May be stopped and started again on its port."""

    def __init__(self, monkeypatch: Any, keys: list[str], prefix: str = "") -> None:
        self.load = Load(pool_use=0.25, running=3, waiting=1)
        monkeypatch.setattr("fraqtl_serve.http.routes.read_load", lambda families: self.load)
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        self.prefix = prefix
        self.port = 0
        self.start_anew(keys)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def page(self) -> str:
        return f"{self.url}{self.prefix}/plugins/fraqtl/"

    async def _behind_proxy(self, scope: Any, receive: Any, send: Any) -> None:
        """A proxy that takes its prefix off the path, as --root-path expects; it answers nothing else."""
        if scope["type"] == "http":
            assert scope["path"].startswith(self.prefix), scope["path"]
            scope = {**scope, "path": scope["path"].removeprefix(self.prefix)}
        await self.app(scope, receive, send)

    def start_anew(self, keys: list[str]) -> None:
        """As another process would: with these keys, and no memory of the one before."""
        self.app = make_app(keys, time.time())
        self.app.root_path = self.prefix
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(
            self._behind_proxy, port=self.port, interface="asgi3", log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.02)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)


@contextmanager
def page_server(monkeypatch: Any, *keys: str, prefix: str = "") -> Iterator[PageServer]:
    server = PageServer(monkeypatch, list(keys), prefix)
    try:
        yield server
    finally:
        server.stop()
