"""Pure ASGI middleware that adds the report to OpenAI-style responses.

It decorates what is sent anyway: one JSON body, or one chunk of a stream (the one with the usage
if the client asked for usage, else the one that ends the last choice). Events are neither added
nor held back.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fraqtl_serve.accounting import Accounting
from fraqtl_serve.report import KVReport, Ledger

PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class ReportMiddleware:
    """Wraps the application; `accounting` is set on the application's state once the engine is up."""

    def __init__(self, app: Application, *, in_body: bool = True) -> None:
        self.app = app
        self.in_body = in_body

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        accounting: Accounting | None = None
        if scope["type"] == "http" and scope["method"] == "POST" and _path(scope) in PATHS:
            accounting = getattr(scope["app"].state, "fraqtl_accounting", None)
        if accounting is None:
            await self.app(scope, receive, send)
            return
        ledger = accounting.open()
        request = _Request(receive, usage_forced=getattr(scope["app"].state.args, "enable_force_include_usage", False))
        try:
            await self.app(scope, request.receive, _Response(request, ledger, send, self.in_body).send)
        finally:
            accounting.close(ledger)


def _path(scope: MutableMapping[str, Any]) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class _Request:
    """Overhears the request's body, to know whether its stream will end with a chunk of usage."""

    def __init__(self, receive: Receive, *, usage_forced: bool) -> None:
        self._receive = receive
        self._usage_forced = usage_forced
        self._body = bytearray()  # grows in place: a body can be many megabytes in many pieces

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._body += message.get("body", b"")
        return message

    @property
    def wants_usage(self) -> bool:
        if self._usage_forced:
            return True
        if b'"include_usage"' not in self._body:
            return False
        options = (_parse(self._body) or {}).get("stream_options") or {}
        return bool(options.get("include_usage"))


class _Response:
    """One response on its way out: decides at its start whether it is JSON, a stream, or neither."""

    def __init__(self, request: _Request, ledger: Ledger, send: Send, in_body: bool) -> None:
        self.request = request
        self.ledger = ledger
        self.forward = send
        self.in_body = in_body
        self.start: Message | None = None  # of a JSON response, held until its headers are known
        self.body = b""
        self.stream: StreamDecorator | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"").split(b";")[0]
            if message["status"] == 200 and kind == b"application/json":
                self.start = message
                return
            if kind == b"text/event-stream" and self.in_body:
                self.stream = StreamDecorator(self.ledger, usage_chunk=self.request.wants_usage)
        elif message["type"] == "http.response.body":
            if self.start is not None:
                await self._json_body(message)
                return
            if self.stream is not None:
                body = self.stream.feed(message.get("body", b""), last=not message.get("more_body", False))
                message = {**message, "body": body}
        await self.forward(message)

    async def _json_body(self, message: Message) -> None:
        self.body += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self.start is not None
        headers = [(k, v) for k, v in self.start["headers"] if k != b"content-length"]
        report = self.ledger.report()
        if report is not None:
            headers += [
                (b"x-fraqtl-kv-bytes", str(report.bytes).encode()),
                (b"x-fraqtl-kv-saved-bytes", str(report.saved_bytes).encode()),
            ]
            if self.in_body and (payload := _parse(self.body)) is not None:
                self.body = _dump(decorate(payload, report))
        headers.append((b"content-length", str(len(self.body)).encode()))
        await self.forward({**self.start, "headers": headers})
        await self.forward({**message, "body": self.body})


def decorate(payload: dict[str, Any], report: KVReport) -> dict[str, Any]:
    """`payload` with the report at its top level, and its integers in `usage` where there is one."""
    payload["fraqtl"] = report.model_dump()
    if isinstance(payload.get("usage"), dict):
        payload["usage"]["kv_cache"] = report.usage()
    return payload


def _parse(body: bytes | bytearray) -> dict[str, Any] | None:
    """The JSON object in `body`; None for anything else, which is not ours to judge."""
    try:
        payload = json.loads(body)
    except ValueError:
        return None
    return payload if isinstance(payload, dict) else None


def _dump(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


class StreamDecorator:
    """Rewrites one event of a stream of server-sent events; everything else passes byte for byte.

    usage_chunk: the client asked for usage, so a last chunk without choices will carry it.
    """

    def __init__(self, ledger: Ledger, *, usage_chunk: bool) -> None:
        self.ledger = ledger
        self.usage_chunk = usage_chunk
        self.finished = 0
        self.done = False
        self.rest = b""  # the beginning of an event whose end was not sent yet

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Take what the application sent; returns what goes to the client now."""
        if self.done and not self.rest:
            return data
        *events, self.rest = (self.rest + data).split(b"\n\n")
        out = b"".join(self._event(event) + b"\n\n" for event in events)
        if last:
            out, self.rest = out + self.rest, b""
        return out

    def _event(self, event: bytes) -> bytes:
        if self.done or not event.startswith(b"data: {"):
            return event
        # Only a chunk that ends a choice or carries the usage is worth parsing.
        if b'"finish_reason":"' not in event and b'"choices":[]' not in event:
            return event
        payload = _parse(event[len(b"data: ") :])
        if payload is None:
            return event
        self.finished += sum(choice.get("finish_reason") is not None for choice in payload.get("choices", ()))
        if not self._is_ours(payload):
            return event
        report = self.ledger.report()
        if report is None:
            return event
        self.done = True
        return b"data: " + _dump(decorate(payload, report))

    def _is_ours(self, payload: dict[str, Any]) -> bool:
        if self.usage_chunk:
            return payload.get("choices") == [] and payload.get("usage") is not None
        return self.finished == self.ledger.sequences
