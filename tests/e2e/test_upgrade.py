"""What Java's HTTP client sends, to a live server."""

from __future__ import annotations

import json

import pytest

from tests.e2e.reports import ANSWER, MODEL, messages
from tests.e2e.server import Server
from tests.serve.raw_http import H2C, Connection, chunked

BODY = json.dumps({"model": MODEL, "messages": messages(), "temperature": 0, "max_tokens": 30}).encode()


@pytest.mark.parametrize(
    ("length", "sent"),
    [
        (b"Content-Length: %d\r\n" % len(BODY), BODY),
        (b"Transfer-Encoding: chunked\r\n", chunked(BODY[:20], BODY[20:])),
    ],
    ids=["length", "chunked"],
)
def test_offer_of_http_2_is_answered_as_http_1(demo_server: Server, length: bytes, sent: bytes) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with Connection(demo_server.url) as connection:
        for offer in (H2C, b"", H2C):
            connection.send(head + offer + length + b"\r\n", sent)
            answer = connection.answer()
            assert (answer.version, answer.status) == (11, 200), answer
            said = json.loads(answer.body)
            assert said["choices"][0]["message"]["content"] == ANSWER
            assert said["fraqtl"]["bytes"] > 0
    assert "Unsupported upgrade request" not in demo_server.log
