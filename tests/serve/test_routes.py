"""The JSON routes on a FastAPI application with vLLM's own error handlers, without an engine."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from fraqtl_serve.http.routes import router
from fraqtl_serve.reports.capacity import Load
from fraqtl_serve.reports.history import SECONDS, History
from fraqtl_serve.reports.records import Records, RequestRecord
from fraqtl_serve.reports.report import KVReport, Ledger
from tests.serve.fake_engine import account
from tests.serve.pools import pool

POOL = pool()
PATHS = (
    "/plugins/fraqtl/capacity",
    "/plugins/fraqtl/requests",
    "/plugins/fraqtl/requests/r1",
    "/plugins/fraqtl/history",
)
REPORT: KVReport | None = Ledger("k4v4", accounts={"a": account([1])}).report()


def record(number: int) -> RequestRecord:
    return RequestRecord(id=f"r{number}", endpoint="/v1/completions", status="finished", time=1.5, report=REPORT)


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    init_exception_handler(app)
    app.include_router(router)
    app.state.args = Namespace(api_key=None, log_error_stack=False)
    app.state.fraqtl_pool = POOL
    app.state.fraqtl_history = History()
    app.state.fraqtl_records = Records()
    for number in range(60):
        app.state.fraqtl_records.add(record(number))
    return app


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app)


def error(response: Any) -> dict[str, Any]:
    """What went wrong, in OpenAI's shape."""
    [(key, error)] = response.json().items()
    assert key == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return dict(error)


def test_capacity(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(pool_use=0.5, running=2, waiting=0)
    monkeypatch.setattr("fraqtl_serve.http.routes.read_load", lambda families: load)
    assert client.get(PATHS[0]).json() == POOL.capacity(load).model_dump()


@pytest.mark.parametrize("path", PATHS)
def test_a_server_without_an_engine(app: FastAPI, client: TestClient, path: str) -> None:
    del app.state.fraqtl_pool, app.state.fraqtl_history, app.state.fraqtl_records
    response = client.get(path)
    assert response.status_code == 503
    assert "pool" in error(response)["message"]


def test_requests(client: TestClient) -> None:
    found = client.get(PATHS[1], params={"limit": 2}).json()
    assert found == {"requests": [record(59).model_dump(), record(58).model_dump()]}
    assert found["requests"][0]["report"]["bytes"] == 2176
    assert len(client.get(PATHS[1]).json()["requests"]) == 50
    assert len(client.get(PATHS[1], params={"limit": 256}).json()["requests"]) == 60


@pytest.mark.parametrize("limit", ["0", "-1", "257", "many", ""])
def test_wrong_limits(client: TestClient, limit: str) -> None:
    response = client.get(PATHS[1], params={"limit": limit})
    assert response.status_code == 400  # as vLLM answers on its own routes
    assert "limit" in str(error(response)["param"])


def test_one_request(client: TestClient) -> None:
    assert client.get(PATHS[2]).json() == record(1).model_dump()


def test_unknown_request(client: TestClient) -> None:
    response = client.get("/plugins/fraqtl/requests/nope")
    assert response.status_code == 404
    assert "nope" in error(response)["message"]


def test_history(app: FastAPI, client: TestClient) -> None:
    for when, use in ((10.0, 0.0), (12.0, 0.5), (14.0, 0.25)):
        app.state.fraqtl_history.add(when, use)
    everything = {"seconds": SECONDS, "time": [10.0, 12.0, 14.0], "pool_use": [0.0, 0.5, 0.25]}
    assert client.get(PATHS[3]).json() == everything
    assert client.get(PATHS[3], params={"since": 10.0}).json() == {
        **everything,
        "time": [12, 14],
        "pool_use": [0.5, 0.25],
    }
    assert client.get(PATHS[3], params={"since": 14.0}).json()["time"] == []
    for wrong in ("nan", "inf", "yesterday"):
        response = client.get(PATHS[3], params={"since": wrong})
        assert response.status_code == 400 and "since" in str(error(response)["param"])


def test_models_stand_in_the_schema(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert set(PATHS[:2]) <= schema["paths"].keys()
    assert {"Capacity", "KVReport", "RequestRecord", "RequestList"} <= schema["components"]["schemas"].keys()
