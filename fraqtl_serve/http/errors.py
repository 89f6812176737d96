"""Errors in the shape that clients parse: OpenAI's, and Anthropic's below /v1/messages.

vLLM has several: its own handlers write OpenAI's, its key check `{"error": "Unauthorized"}`, and what Starlette
and FastAPI refuse by themselves is `{"detail": ...}`. `ErrorShape` is the outermost middleware and rewrites
whatever leaves as an error in another shape. Answers that are no errors pass untouched.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fraqtl_serve.http.asgi import Application, Message, Receive, Scope, Send, route_path
from fraqtl_serve.http.streams import dump, parse

Headers = list[tuple[bytes, bytes]]
ANTHROPIC = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ANTHROPIC_KNOWN = {*ANTHROPIC_TYPES.values(), "api_error", "invalid_request_error", "billing_error", "timeout_error"}
FIELDS = {"message", "type", "param", "code"}
NEEDS_KEY = "this server needs its API key: Authorization: Bearer KEY, or x-api-key: KEY"
# Probes and scrapers look at the status; there the body is what vLLM says.
UNSHAPED = ("/health", "/ping", "/metrics", "/static/")


def error_body(status: int, message: str, *, param: str | None = None, kind: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, as vLLM fills it: `type` is the status in words and `code` its number."""
    kind = kind or HTTPStatus(status).phrase
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def send_error(send: Send, status: int, message: str, *, headers: Headers | None = None) -> None:
    """Answer a request with an error."""
    body = dump(error_body(status, message))
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


class ErrorShape:
    """ASGI middleware. Holds the start of an error back until its body is known."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "HEAD" or route_path(scope).startswith(UNSHAPED):
            await self.app(scope, receive, send)
            return
        await self.app(scope, receive, _Shaper(scope, send).send)


class _Shaper:
    def __init__(self, scope: Scope, send: Send) -> None:
        self.method, self.path = scope["method"], route_path(scope)
        self.forward = send
        self.start: Message | None = None
        self.body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self.start = message
        elif message["type"] == "http.response.body" and self.start is not None:
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish(self.start)
        else:
            await self.forward(message)

    async def _finish(self, start: Message) -> None:
        status, payload = start["status"], parse(self.body)
        if self.path.startswith(ANTHROPIC):
            shaped = _anthropic(status, payload, self._text(payload))
        else:
            shaped = _openai(status, payload, self._text(payload))
        headers: Headers = list(start["headers"])
        if shaped != payload:
            self.body = dump(shaped)
            headers = [(k, v) for k, v in headers if k not in (b"content-length", b"content-type")]
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(self.body)).encode())]
        if status == HTTPStatus.UNAUTHORIZED and not any(k == b"www-authenticate" for k, _ in headers):
            headers.append((b"www-authenticate", b"Bearer"))
        await self.forward({**start, "headers": headers})
        await self.forward({"type": "http.response.body", "body": self.body})

    def _text(self, payload: dict[str, Any] | None) -> str:
        """What an error of no known shape says, and a sentence of ours where it only repeats its status."""
        said = _said(payload) if payload is not None else self.body.decode(errors="replace").strip()
        if said and said not in _PHRASES:
            return said
        return {
            401: NEEDS_KEY,
            404: f"no route {self.path}: GET /openapi.json lists them",
            405: f"{self.path} doesn't take {self.method}: the Allow header names what it takes",
        }.get(int(self.status), said or HTTPStatus(self.status).phrase)

    @property
    def status(self) -> int:
        assert self.start is not None
        return int(self.start["status"])


_PHRASES = {status.phrase for status in HTTPStatus}


def _said(payload: dict[str, Any]) -> str:
    error, detail = payload.get("error"), payload.get("detail")
    if isinstance(error, dict):
        return str(error.get("message") or "")
    if isinstance(error, str):
        return error
    if isinstance(detail, list):  # FastAPI's own list of validation errors
        return "; ".join(f"{_place(item)}: {item.get('msg')}" for item in detail if isinstance(item, dict))
    return str(detail or payload.get("message") or "")


def _place(item: dict[str, Any]) -> str:
    return ".".join(map(str, item.get("loc") or ()))


def _openai(status: int, payload: dict[str, Any] | None, text: str) -> dict[str, Any]:
    payload = payload or {}
    given = payload.get("error")
    if isinstance(given, dict) and payload.keys() == {"error"} and given.keys() >= FIELDS:
        return payload
    error = given if isinstance(given, dict) else {}
    detail = payload.get("detail")
    param = _place(detail[0]) if isinstance(detail, list) and detail and isinstance(detail[0], dict) else None
    return error_body(status, text, param=error.get("param") or param, kind=error.get("type"))


def _anthropic(status: int, payload: dict[str, Any] | None, text: str) -> dict[str, Any]:
    payload = payload or {}
    error: Any = payload.get("error")
    whole = payload.get("type") == "error" and isinstance(error, dict) and "message" in error
    if whole and error.get("type") in ANTHROPIC_KNOWN:  # vLLM puts names of its own there: BadRequestError
        return payload
    kind = ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": text}}
