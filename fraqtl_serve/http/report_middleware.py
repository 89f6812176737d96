"""Pure ASGI middleware that adds the report to responses of OpenAI's and Anthropic's kind.

It decorates what is sent anyway: one JSON body, or one event of a stream (see `streams`). Events
are neither added nor held back.
"""

from __future__ import annotations

from fraqtl_serve.engine.accounting import Accounting, current_ledger
from fraqtl_serve.http.asgi import Application, Message, Receive, Scope, Send, route_path
from fraqtl_serve.http.streams import ChunkDecorator, NamedEventDecorator, StreamDecorator, decorate, dump, parse
from fraqtl_serve.reports.report import Ledger

# How a stream of each endpoint says that it is done: by a chunk, or by an event of this name.
LAST_EVENT = {
    "/v1/chat/completions": None,
    "/v1/completions": None,
    "/v1/chat/completions/batch": None,  # never streams
    "/v1/responses": b"response.completed",
    "/v1/messages": b"message_delta",
}


class ReportMiddleware:
    """Wraps the application; `accounting` is set on the application's state once the engine is up.

    in_body: not only in the headers. in_usage: the counts in the body's `usage`, too.
    """

    def __init__(self, app: Application, *, in_body: bool = True, in_usage: bool = True) -> None:
        self.app = app
        self.in_body, self.in_usage = in_body, in_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        accounting: Accounting | None = None
        if scope["type"] == "http" and scope["method"] == "POST" and route_path(scope) in LAST_EVENT:
            accounting = getattr(scope["app"].state, "fraqtl_accounting", None)
        if accounting is None:
            # A pipelined request starts in the context of the one before it.
            current_ledger.set(None)
            await self.app(scope, receive, send)
            return
        ledger = accounting.open(route_path(scope))
        request = _Request(
            receive,
            path=route_path(scope),
            usage_forced=getattr(scope["app"].state.args, "enable_force_include_usage", False),
        )
        try:
            await self.app(scope, request.receive, _Response(request, ledger, send, self).send)
        finally:
            accounting.close(ledger)


class _Request:
    """Overhears the request's body, to know whether its stream will end with a chunk of usage."""

    def __init__(self, receive: Receive, *, path: str, usage_forced: bool) -> None:
        self.path = path
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
        options = (parse(self._body) or {}).get("stream_options") or {}
        return bool(options.get("include_usage"))


class _Response:
    """One response on its way out: decides at its start whether it is JSON, a stream, or neither."""

    def __init__(self, request: _Request, ledger: Ledger, send: Send, shown: ReportMiddleware) -> None:
        self.request = request
        self.ledger = ledger
        self.forward = send
        self.shown = shown
        self.start: Message | None = None  # of a JSON response, held until its headers are known
        self.body = b""
        self.stream: StreamDecorator | None = None

    async def send(self, message: Message) -> None:
        if self.stream is not None:  # first, for it comes with every token
            given = message.get("body", b"")
            body = self.stream.feed(given, last=not message.get("more_body", False))
            await self.forward(message if body is given else {**message, "body": body})
        elif message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"").split(b";")[0]
            if message["status"] == 200 and kind == b"application/json":
                self.start = message
                return
            if kind == b"text/event-stream" and self.shown.in_body:
                self.stream = self._decorator()
            await self.forward(message)
        elif message["type"] == "http.response.body" and self.start is not None:
            await self._json_body(message)
        else:
            await self.forward(message)

    def _decorator(self) -> StreamDecorator:
        name = LAST_EVENT[self.request.path]
        if name is not None:
            return NamedEventDecorator(self.ledger, name, in_usage=self.shown.in_usage)
        return ChunkDecorator(self.ledger, usage_chunk=self.request.wants_usage, in_usage=self.shown.in_usage)

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
            if (payload := parse(self.body)) is not None:
                self.ledger.response_id = str(payload.get("id") or "")
                if self.shown.in_body:
                    self.body = dump(decorate(payload, report, in_usage=self.shown.in_usage))
        headers.append((b"content-length", str(len(self.body)).encode()))
        await self.forward({**self.start, "headers": headers})
        await self.forward({**message, "body": self.body})
