"""The closed loop against a small server that counts what is in flight."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fraqtl_bench.closed_loop import Load, run
from fraqtl_kernels.errors import FraqtlError

LOAD = Load("m", requests=12, concurrency=3, input=5, output=4, seed=1)
PAUSE = 0.02  # before each token


class Handler(BaseHTTPRequestHandler):
    lock = threading.Lock()
    in_flight, most, broken = 0, 0, False
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        cls = type(self)
        with self.lock:
            cls.in_flight += 1
            cls.most = max(cls.most, cls.in_flight)
            cls.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.end_headers()
        for number in range(4):
            time.sleep(PAUSE)
            reason = '"length"' if number == 3 and not self.broken else "null"
            self.wfile.write(b'data: {"choices":[{"text":"a","finish_reason":%s}]}\n\n' % reason.encode())
        with self.lock:
            cls.in_flight -= 1

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Handler.bodies, Handler.most, Handler.broken = [], 0, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_so_many_are_in_flight_and_times_are_those_of_the_server(url: str) -> None:
    found = run(url, LOAD)
    assert Handler.most == LOAD.concurrency
    assert sorted(json.dumps(body) for body in Handler.bodies) == sorted(
        json.dumps(json.loads(body)) for body in LOAD.bodies()
    )
    assert len({tuple(body["prompt"]) for body in Handler.bodies}) == LOAD.requests  # no two alike: no cached prefix
    assert found["median_ttft_ms"] >= 1e3 * PAUSE
    assert found["median_tpot_ms"] >= 1e3 * PAUSE * 0.99
    assert found["output_throughput"] <= LOAD.concurrency * 4 / (4 * PAUSE)


def test_an_answer_that_is_not_whole_counts_for_nothing(url: str) -> None:
    Handler.broken = True
    with pytest.raises(FraqtlError, match=r"not answered in full: HTTP/1\.1 200"):
        run(url, LOAD)


def test_a_server_that_is_gone() -> None:
    with pytest.raises(FraqtlError, match="failed under load"):
        run("http://127.0.0.1:9", LOAD)
