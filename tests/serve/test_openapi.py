"""The OpenAPI document of vLLM's application with our plugin on it."""

from __future__ import annotations

from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from fraqtl_serve.http.report_middleware import LAST_EVENT
from fraqtl_serve.http.streams import decorate
from fraqtl_serve.reports.report import KVReport, Ledger
from tests.serve.fake_engine import account
from tests.serve.vllm_app import KEY, client_of, make_app

REPORT = Ledger("k4v4", accounts={"a": account([1])}).report()


def document(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    response = client_of(make_app(monkeypatch, *flags)).get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.slow
def test_document_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ((), ("--api-key", KEY), ("--no-fraqtl-report",)):
        found = document(monkeypatch, *flags)
        assert found["openapi"].startswith("3.1")
        assert list(OpenAPIV31SpecValidator(found).iter_errors()) == []  # type: ignore[arg-type]


def test_answers_of_v1_say_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    found = document(monkeypatch)
    for path in LAST_EVENT:
        responses = found["paths"][path]["post"]["responses"]
        assert responses["200"]["headers"].keys() == {"X-Fraqtl-KV-Bytes", "X-Fraqtl-KV-Saved-Bytes"}
        schema = responses["200"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ReportedResponse"}
        assert "422" not in responses and "4XX" in responses
    models = found["components"]["schemas"]
    assert models["KVReport"]["properties"].keys() == KVReport.model_fields.keys()
    assert models["KVReport"]["properties"]["version"]["const"] == 1
    assert all(
        property.get("description") for name, property in models["KVReport"]["properties"].items() if name != "version"
    )


def test_schema_takes_a_decorated_answer_and_no_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = document(monkeypatch)
    validator = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/ReportedResponse", "components": found["components"]}
    )
    assert REPORT is not None
    answer = decorate({"id": "chatcmpl-1", "usage": {"prompt_tokens": 3}}, REPORT)
    validator.validate(answer)
    validator.validate({"id": "the engine said nothing"})
    for wrong in ({"version": 2}, {"bytes": "many"}, {"kv_format": None}):
        assert not validator.is_valid({**answer, "fraqtl": {**answer["fraqtl"], **wrong}}), wrong
    assert not validator.is_valid({**answer, "usage": {"kv_cache": {"tokens": 0.5}}})


def test_switched_off_report_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = document(monkeypatch, "--no-fraqtl-report")["paths"]["/v1/completions"]["post"]["responses"]["200"]
    assert "X-Fraqtl-KV-Bytes" in answer["headers"]
    # What vLLM says of it: 0.32 says nothing.
    assert answer["content"]["application/json"]["schema"] in ({}, {"$ref": "#/components/schemas/CompletionResponse"})


def test_usage_without_counts_is_not_promised_any(monkeypatch: pytest.MonkeyPatch) -> None:
    models = document(monkeypatch, "--no-fraqtl-usage")["components"]["schemas"]
    assert (
        "kv_cache" not in models["ReportedUsage"]["properties"] and "fraqtl" in models["ReportedResponse"]["properties"]
    )
    assert "kv_cache" in document(monkeypatch)["components"]["schemas"]["ReportedUsage"]["properties"]


def test_our_routes_name_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = document(monkeypatch)
    for path in ("capacity", "requests", "requests/{request_id}"):
        responses = found["paths"][f"/plugins/fraqtl/{path}"]["get"]["responses"]
        assert responses.keys() == {"200", "4XX", "503"}


def test_key_is_a_security_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "security" not in document(monkeypatch)
    found = document(monkeypatch, "--api-key", KEY)
    assert found["security"] == [{"key": []}, {"x-api-key": []}]
    assert found["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
