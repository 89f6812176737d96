"""The application's OpenAPI document, with what we add to the answers of /v1.

vLLM 0.32 leaves the schema of these answers open (`{}`), and that of 0.33 knows nothing of ours: so ours takes its
place, names our own additions and allows everything else.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from fraqtl_serve.http.errors import ANTHROPIC
from fraqtl_serve.http.report_middleware import LAST_EVENT
from fraqtl_serve.reports.report import KVReport, KVUsage

REF = "#/components/schemas/{model}"
JSON, STREAM = "application/json", "text/event-stream"


class ReportedUsage(BaseModel):
    """`usage`, with the counts of the report beside those of tokens."""

    model_config = ConfigDict(extra="allow")
    kv_cache: KVUsage | None = None


class ReportedResponse(BaseModel):
    """A response that ran a model: what its own API says it holds, and this."""

    model_config = ConfigDict(extra="allow")
    fraqtl: KVReport | None = Field(None, description="KV memory of the request; absent if the engine said nothing")
    usage: ReportedUsage | None = None


HEADERS = {
    "X-Fraqtl-KV-Bytes": "`bytes` of the report",
    "X-Fraqtl-KV-Saved-Bytes": "`saved_bytes` of the report",
}
IN_A_STREAM = "One event carries `fraqtl`: the one with the usage, else the one that ends the last choice."


def extend(app: FastAPI, *, in_body: bool, in_usage: bool, asks_for_key: bool) -> None:
    """Have `app.openapi()`, which FastAPI lets one replace, say what the reports add and what errors look like."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _extended(original(), in_body, in_usage, asks_for_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _extended(document: dict[str, Any], in_body: bool, in_usage: bool, asks_for_key: bool) -> dict[str, Any]:
    _, models = models_json_schema([(ReportedResponse, "serialization")], ref_template=REF)
    if not in_usage:
        del models["$defs"]["ReportedUsage"]["properties"]["kv_cache"]
    components = document.setdefault("components", {})
    components["schemas"] = {**components.get("schemas", {}), **models["$defs"]}
    if asks_for_key:
        schemes = components.setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer"}
        schemes["x-api-key"] = {"type": "apiKey", "in": "header", "name": "x-api-key"}
        document["security"] = [{name: []} for name in ("key", "x-api-key")]  # either will do
    for path in LAST_EVENT:
        for operation in document["paths"].get(path, {}).values():
            _say_what_is_added(operation["responses"], path, in_body)
    return document


def _say_what_is_added(responses: dict[str, Any], path: str, in_body: bool) -> None:
    answer = responses.setdefault("200", {"description": "Successful Response"})
    answer["headers"] = {
        name: {"description": text, "schema": {"type": "integer"}, "required": False} for name, text in HEADERS.items()
    }
    if in_body:
        content = answer.setdefault("content", {})
        content[JSON] = {"schema": {"$ref": REF.format(model="ReportedResponse")}}
        if STREAM in content:
            answer["description"] += f". {IN_A_STREAM}"
    error = "AnthropicErrorResponse" if path.startswith(ANTHROPIC) else "ErrorResponse"
    responses["4XX"] = {
        "description": "Refused",
        "content": {JSON: {"schema": {"$ref": REF.format(model=error)}}},
    }
    responses.pop("422", None)  # vLLM answers 400
