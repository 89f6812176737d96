"""Offers to change the protocol, declined: the request is answered as what it is, HTTP/1.1.

Java's HTTP client offers `Upgrade: h2c` with its first request. httptools takes every offer for accepted and
what follows the headers for another protocol, so uvicorn loses the body. Here the head of such a request is read again
without the offer. Only a GET that wants a WebSocket goes on as before, and CONNECT, which offers nothing.
"""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fraqtl_serve.engine import hooks
from fraqtl_serve.http.asgi import Application, Receive, Scope, Send

# Headers of the offer itself, and what Connection says of them.
OFFER = {b"upgrade", b"http2-settings"}


class _Parser:
    """In the place of httptools' parser: one that comes back from an offer to the request that made it."""

    def __init__(self, protocol: DecliningProtocol) -> None:
        self._protocol = protocol
        self._renew()

    def _renew(self) -> None:
        self._parser = httptools.HttpRequestParser(self._protocol)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it

    def feed_data(self, data: bytes) -> None:
        """Raises what httptools' parser raises; HttpParserUpgrade only for what is to be a WebSocket, or CONNECT."""
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._protocol.declines:
                    raise
                data = self._protocol.head_without_offer() + data[upgrade.args[0] :]
                self._renew()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


class DecliningProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 over httptools."""

    declines = False
    """Whether the request that is being read made an offer that will be declined; then no handler hears of it yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)  # type: ignore[assignment]

    def on_message_begin(self) -> None:
        self.declines = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        offers = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        self.declines = offers and not self._should_upgrade()
        if not self.declines:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.declines:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.declines:
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return self.parser.get_method() == b"GET" and super()._should_upgrade()  # RFC 6455: a handshake is a GET

    def head_without_offer(self) -> bytes:
        """The head of the present request as it came, but for the offer."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in OFFER)
            if name not in OFFER:
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])


class DeclinedUpgrades:
    """ASGI middleware: when the application starts, gives its server the protocol above for all connections."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            server = getattr(scope["app"].state, "server", None)
            # uvicorn's other implementation, where httptools isn't installed, declines by itself.
            if server is not None and server.config.http_protocol_class is HttpToolsProtocol:
                hooks.PROTOCOL.put(server.config, DecliningProtocol)
        await self.app(scope, receive, send)
