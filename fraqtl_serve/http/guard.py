"""No route without its key: everything is closed but a short list.

vLLM asks for the key only below a few prefixes (/v1 and the like) and leaves others open that run the model or
tell of its users: /invocations, /generative_scoring, /tokenize, /load. Here a route is closed unless it is named.

The key may come as `Authorization: Bearer KEY` or as `x-api-key: KEY`, which is what Anthropic's clients send. Whatever
is sent must be right: a wrong key in one header is refused, also beside a right one in the other.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from argparse import Namespace
from collections.abc import Iterator

from fraqtl_serve.http.asgi import Application, Receive, Scope, Send, route_path
from fraqtl_serve.http.errors import NEEDS_KEY, send_error

PREFIX = "/plugins/fraqtl"
# Probes and scrapers have no key; documents and the page's own files say nothing about anybody's requests.
PROBES = frozenset({"/health", "/ping", "/version"})
METRICS = "/metrics"
DOCUMENTS = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
PAGE = frozenset({PREFIX, f"{PREFIX}/"})
STATIC = ("/static/", f"{PREFIX}/static/")
AUTHORIZATION, X_API_KEY = b"authorization", b"x-api-key"


def api_keys(args: Namespace) -> list[str]:
    """The keys that vLLM accepts on /v1: those of the command line, or else that of the environment."""
    return [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]


def is_open(path: str) -> bool:
    """Whether `path` answers without a key."""
    return path in PROBES | DOCUMENTS | PAGE or is_metrics(path) or path.startswith(STATIC)


def is_metrics(path: str) -> bool:
    return path == METRICS or path.startswith(f"{METRICS}/")


class KeyGuard:
    """ASGI middleware, inside vLLM's CORS middleware: preflights are answered before they come here."""

    def __init__(self, app: Application, *, keys: list[str]) -> None:
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or is_open(route_path(scope)) or self._has_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": NEEDS_KEY})
        else:
            await send_error(send, 401, NEEDS_KEY, headers=[(b"www-authenticate", b"Bearer")])

    def _has_key(self, scope: Scope) -> bool:
        right = [self._is_right(key) for key in _given(scope)]
        return bool(right) and all(right)

    def _is_right(self, key: bytes) -> bool:
        # All keys are compared, and digests instead of keys: how long it takes must not tell how much was right.
        matches = [secrets.compare_digest(_digest(key), digest) for digest in self._digests]
        return any(matches)


class XApiKey:
    """ASGI middleware, outside vLLM's own check, which reads `Authorization` only: there it puts an x-api-key too.

    It judges nothing: where both headers are sent, vLLM looks at one of them and `KeyGuard` at both.
    """

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            sent = dict(reversed([(name, value) for name, value in scope["headers"] if value]))  # the first counts
            if X_API_KEY in sent and AUTHORIZATION not in sent:
                headers = [(name, value) for name, value in scope["headers"] if name != AUTHORIZATION]
                scope = {**scope, "headers": [*headers, (AUTHORIZATION, b"Bearer " + sent[X_API_KEY])]}
        await self.app(scope, receive, send)


def _given(scope: Scope) -> Iterator[bytes]:
    """Every key that a request brings; an empty one, which is never right, for a scheme that isn't Bearer.

    An empty header is none: that is how a client leaves out a key that it is configured to send.
    """
    for name, value in scope["headers"]:
        if name == X_API_KEY and value:
            yield value
        elif name == AUTHORIZATION and value:
            scheme, _, key = value.partition(b" ")
            yield key if scheme.lower() == b"bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
