"""A limit on the size of a request's body, which neither vLLM nor its web server has."""

from __future__ import annotations

from fraqtl_serve.http.asgi import Application, Message, Receive, Scope, Send
from fraqtl_serve.http.errors import send_error

DEFAULT_BYTES = 64 << 20  # a prompt of a million tokens is some 4 MB; images travel inside bodies, too


class BodyLimit:
    """ASGI middleware: 413 for bodies of more than `limit` bytes, said or found.

    A body whose length was not said is counted as it comes in; when it is too long the application hears that the
    client has gone, and what it answers to that is dropped.
    """

    def __init__(self, app: Application, *, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if said.isdigit() and int(said) > self.limit:
            await self._refuse(send)
            return
        length, answered, refused = 0, False, False

        async def counted() -> Message:
            nonlocal length, refused
            if refused:
                return {"type": "http.disconnect"}
            message = await receive()
            length += len(message.get("body", b""))
            if length > self.limit and not answered:
                refused = True
                await self._refuse(send)
                return {"type": "http.disconnect"}
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal answered
            if not refused:
                answered = True
                await send(message)

        await self.app(scope, counted, unless_refused)

    async def _refuse(self, send: Send) -> None:
        await send_error(send, 413, f"a request's body may have {self.limit} bytes (--max-body-bytes), this has more")
