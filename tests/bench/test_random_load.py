"""The random load that reports are checked with: it ends, whatever the server does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fraqtl_bench.random_load import make_jobs, send_all

ANSWER = {"fraqtl": {"tokens": 1}, "choices": []}


class Handler(BaseHTTPRequestHandler):
    """Answers the first request, and never the others."""

    silence = threading.Event()
    posts = 0

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        type(self).posts += 1
        if self.posts > 1:
            self.silence.wait(60)
        self._answer(ANSWER)

    def _answer(self, payload: object) -> None:
        body = json.dumps(payload).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.silence.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_requests_without_an_answer_are_named_when_the_time_is_over(url: str) -> None:
    jobs = [job for job in make_jobs(40, seed=1, longest=20, answer=4) if not job.aborts and not job.stream][:3]
    done: list[int] = []
    outcomes = asyncio.run(send_all(url, jobs, 1, seconds=1, progress=done.append))
    assert list(outcomes) == [job.id for job in jobs]
    first, *others = outcomes.values()
    assert (first.status, first.error, first.report) == ("finished", None, ANSWER["fraqtl"])
    assert [other.error for other in others] == ["no answer when the 1 s for all requests were over"] * 2
    assert done == [1]


def test_a_connection_that_breaks_is_an_error_of_its_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_POST", lambda handler: handler.connection.close())
    jobs = make_jobs(5, seed=1, longest=20, answer=4)
    outcomes = asyncio.run(send_all(url, jobs, 2, seconds=30))
    assert all("Error(" in (outcome.error or "") for outcome in outcomes.values()), outcomes
