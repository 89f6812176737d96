"""HTTP/1.1 over a bare socket, for what client libraries don't send."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


@dataclass
class Answer:
    version: int
    status: int
    headers: dict[str, str]
    body: bytes


class _Kept:
    """The one buffer for all answers of a connection: who has read one doesn't close it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        pass


class Connection:
    def __init__(self, url: str, timeout: float = 60) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=timeout)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)

    def answer(self, method: str = "POST") -> Answer:
        """The next answer on this connection; raises http.client's errors for what is none."""
        response = HTTPResponse(self.socket, method=method)
        response.fp = _Kept(self._file)  # type: ignore[assignment]
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        body = response.read()
        return Answer(response.version, response.status, headers, body)
