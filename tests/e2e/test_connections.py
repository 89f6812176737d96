"""A live server on one connection: Java's offer of HTTP/2, and an idle one used again."""

from __future__ import annotations

import json
import time

import pytest

from tests.e2e.reports import ANSWER, MODEL, messages
from tests.e2e.server import Server
from tests.serve.raw_http import H2C, Connection, chunked

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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
    with Connection(demo_server.url) as connection:
        for offer in (H2C, b"", H2C):
            connection.send(HEAD + offer + length + b"\r\n", sent)
            answer = connection.answer()
            assert (answer.version, answer.status) == (11, 200), answer
            said = json.loads(answer.body)
            assert said["choices"][0]["message"]["content"] == ANSWER
            assert said["fraqtl"]["bytes"] > 0
    assert "Unsupported upgrade request" not in demo_server.log


def test_idle_connection_is_open_for_longer_than_clients_use_theirs(demo_server: Server) -> None:
    with Connection(demo_server.url) as connection:
        for idle in (6, 0):  # httpx uses a connection again for five seconds
            connection.send(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY), BODY)
            assert connection.answer().status == 200
            time.sleep(idle)
