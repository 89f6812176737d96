from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, model_validator

from fraqtl_serve.http.validation import ValidationErrorMiddleware
from tests.serve.vllm_app import client_of, make_app


class Body(BaseModel):
    field: Any = None

    @model_validator(mode="before")
    @classmethod
    def stumbles(cls, data: Any) -> Any:
        data["field"].get("a")
        return data


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.add_middleware(ValidationErrorMiddleware)

    @app.post("/body")
    async def handle(body: Body) -> str:
        if body.field.get("fail"):
            raise AttributeError("in the handler")
        return "fine"

    return TestClient(app, raise_server_exceptions=False)


def test_body_that_a_validator_stumbles_over(client: TestClient) -> None:
    response = client.post("/body", json={"field": 3})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == "the body isn't valid, a field has a value of a wrong type: 'int' object has no attribute 'get'"
    assert client.post("/body", json={}).status_code == 400


def test_failures_of_the_server_stay_its_own(client: TestClient) -> None:
    assert client.post("/body", json={"field": {"fail": True}}).status_code == 500


def test_good_bodies_pass(client: TestClient) -> None:
    assert client.post("/body", json={"field": {}}).json() == "fine"


@pytest.mark.parametrize("value", [-1, "a", [1], True])
def test_vllms_own_routes(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    client = client_of(make_app(monkeypatch))
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "structured_outputs": value}
    response = client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, 400)
