"""Prometheus totals against the reports of a random load. `fraqtl-bench totals` runs it in full."""

from __future__ import annotations

from fraqtl_bench.totals import measure
from tests.e2e.server import Server, running


def check(url: str, requests: int) -> None:
    found = measure(url, requests=requests, concurrency=16, seed=7)
    assert found["failed"] == []
    assert found["equal"], found
    assert found["from_responses"]["finished requests"] > requests // 2
    assert found["from_aborted"]["aborted requests"] > 0
    assert found["from_aborted"]["bytes"] > 0


def test_totals_of_one_process(demo_server: Server) -> None:
    check(demo_server.url, requests=60)


def test_totals_of_two_processes() -> None:
    with running("--api-server-count", "2") as server:
        check(server.url, requests=100)
