"""vLLM's own application with our plugin on it, as the server builds it, without an engine behind it."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.routing import Mount
from vllm.entrypoints.launchers.app import build_app

from fraqtl_serve.cli.serve import build_parser

KEY = "sesame"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


def make_app(monkeypatch: pytest.MonkeyPatch, *flags: str, tasks: tuple[str, ...] = ("generate",)) -> FastAPI:
    """tasks: what the model can do, which decides on vLLM's routes."""
    monkeypatch.setenv("VLLM_PLUGINS", "fraqtl")
    args = build_parser().parse_args(["serve", "org/model", *flags])
    return build_app(args, tasks, None)


def client_of(app: FastAPI) -> TestClient:
    """Exceptions become answers, as they do in a real server."""
    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


def every_route(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of all that is registered; parameters of paths are filled in."""
    found = []
    for route in app.routes:
        path: Any = getattr(route, "path", None)
        assert path is not None, f"a route without a path: {route}"
        methods = getattr(route, "methods", None) or {"GET", "POST"}
        if isinstance(route, Mount):
            path = f"{path}/"
        found += [(method, path.replace("{", "").replace("}", "")) for method in methods]
    return found
