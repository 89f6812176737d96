"""The plugin's own routes and metrics on live servers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.alerts import alerts
from tests.e2e.reports import BASELINE_BLOCK_BYTES, BLOCK_BYTES, BLOCK_SIZE, MODEL, metric
from tests.e2e.server import Server, running

CAPACITY, REQUESTS = "/plugins/fraqtl/capacity", "/plugins/fraqtl/requests"
PROMPT = list(range(100, 120))
BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
ENDLESS = {**BODY, "max_tokens": 4000, "stream": True}
POOL_BYTES = 256 << 20  # what the server takes on a CPU by default
SUMS = {
    "tokens": "fraqtl:kv_tokens_total",
    "bytes": "fraqtl:kv_bytes_total",
    "saved_bytes": "fraqtl:kv_saved_bytes_total",
}


def get(server: Server, path: str) -> Any:
    response = httpx.get(server.url + path, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def complete(server: Server, body: dict[str, Any] = BODY, **options: Any) -> Any:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120, **options).raise_for_status()


def hang_up(server: Server, tokens: int = 3) -> str:
    """Read so many chunks of an endless stream, and go; returns its id."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, timeout=120) as response:
        lines = (line for line in response.iter_lines() if line)
        first, *_ = [next(lines) for _ in range(tokens)]
    return str(httpx.Response(200, text=first.removeprefix("data: ")).json()["id"])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)


def totals(server: Server) -> dict[str, float]:
    names = {**SUMS, "requests": "fraqtl:requests_total", "observed": "fraqtl:request_kv_bytes_count"}
    return {key: metric(server.url, name) for key, name in names.items()}


@pytest.mark.smoke
def test_capacity(demo_server: Server) -> None:
    capacity = get(demo_server, CAPACITY)
    blocks, baseline_blocks = POOL_BYTES // BLOCK_BYTES, POOL_BYTES // BASELINE_BLOCK_BYTES
    assert capacity["blocks"] == metric_label(demo_server, "vllm:cache_config_info", "num_gpu_blocks") == blocks
    assert (capacity["block_bytes"], capacity["baseline_block_bytes"]) == (BLOCK_BYTES, BASELINE_BLOCK_BYTES)
    assert capacity["pool_bytes"] == blocks * BLOCK_BYTES
    assert capacity["tokens"] == blocks * BLOCK_SIZE
    assert baseline_blocks - capacity["baseline_blocks"] in (0, 1)  # whole blocks only, on both sides
    assert capacity["concurrency"] == round(capacity["tokens"] / 8192, 2)
    assert 0 <= capacity["pool_use"] <= 1


def metric_label(server: Server, name: str, label: str) -> int:
    [line] = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line.startswith(name + "{")]
    return int(line.split(f'{label}="')[1].split('"')[0])


def test_pool_use_while_a_request_runs(demo_server: Server) -> None:
    body = {**ENDLESS, "prompt": [200] * 2000}
    with httpx.stream("POST", f"{demo_server.url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        blocks = get(demo_server, CAPACITY)["blocks"]
        wait_for(lambda: get(demo_server, CAPACITY)["pool_use"] * blocks >= 2000 // BLOCK_SIZE)
    wait_for(lambda: get(demo_server, CAPACITY)["pool_use"] == 0)


def test_finished_request_is_listed_as_it_was_reported(demo_server: Server) -> None:
    answer = complete(demo_server).json()
    [newest] = get(demo_server, f"{REQUESTS}?limit=1")["requests"]
    assert newest == get(demo_server, f"{REQUESTS}/{answer['id']}")
    assert (newest["id"], newest["endpoint"], newest["status"]) == (answer["id"], "/v1/completions", "finished")
    assert newest["report"] == answer["fraqtl"]


def test_aborted_request_is_listed_with_what_it_held(demo_server: Server) -> None:
    request_id = hang_up(demo_server, tokens=3)
    path = f"{REQUESTS}/{request_id}"
    wait_for(lambda: httpx.get(demo_server.url + path).status_code == 200)
    record = get(demo_server, path)
    assert record["status"] == "aborted"
    tokens, blocks = record["report"]["tokens"], record["report"]["blocks"]
    assert len(PROMPT) + 3 - 1 <= tokens < len(PROMPT) + 4000 - 1
    assert blocks * BLOCK_SIZE >= tokens
    assert record["report"]["bytes"] == blocks * BLOCK_BYTES


def test_metrics_are_the_sum_of_the_reports(demo_server: Server) -> None:
    before = totals(demo_server)
    reports = [complete(demo_server, {**BODY, "max_tokens": n}).json()["fraqtl"] for n in (1, 13, 14)]
    request_id = hang_up(demo_server)
    wait_for(lambda: httpx.get(f"{demo_server.url}{REQUESTS}/{request_id}").status_code == 200)
    reports.append(get(demo_server, f"{REQUESTS}/{request_id}")["report"])
    gained = {key: value - before[key] for key, value in totals(demo_server).items()}
    expected = {key: sum(report[key] for report in reports) for key in SUMS}
    assert gained == {**expected, "requests": 4, "observed": 4}


def test_refused_request_is_not_counted(demo_server: Server) -> None:
    before = totals(demo_server)
    httpx.post(f"{demo_server.url}/v1/completions", json={**BODY, "prompt": [100] * 9000}, timeout=60)
    assert totals(demo_server) == before


@pytest.mark.smoke
def test_gauges(demo_server: Server) -> None:
    text = httpx.get(f"{demo_server.url}/metrics").text
    assert 'fraqtl:info{kv_format="k4v4",layout="LBHNC"} 1.0' in text
    assert metric(demo_server.url, "fraqtl:pool_bytes") == POOL_BYTES // BLOCK_BYTES * BLOCK_BYTES
    assert metric(demo_server.url, "fraqtl:ratio") == pytest.approx(256 / 68)


def test_alerts_ask_for_what_is_there(demo_server: Server) -> None:
    complete(demo_server)
    text = httpx.get(f"{demo_server.url}/metrics").text
    samples = re.findall(r"^((?:fraqtl|vllm):\w+)(?:\{(.*)\})?", text, re.M)
    exposed, labels = (
        {name for name, _ in samples},
        {pair.split("=")[0] for _, given in samples for pair in given.split(",")},
    )
    assert len(alerts()) > 5
    for name, query in alerts().items():
        asked = set(re.findall(r"(?:fraqtl|vllm):\w+", query))
        assert asked and asked <= exposed, (name, asked - exposed)
        grouped = {
            label.strip() for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in group.split(",")
        }
        assert grouped <= labels | {"instance"}, (name, grouped)
        assert all(f"{match}" in text for match in re.findall(r"\{(.*?)\}", query)), name
        assert query.count("(") == query.count(")")


def test_errors_have_openais_shape(demo_server: Server) -> None:
    for path, status in ((f"{REQUESTS}/nope", 404), (f"{REQUESTS}?limit=0", 400)):
        response = httpx.get(demo_server.url + path)
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_two_api_servers_behind_a_key() -> None:
    with running("--api-server-count", "2", "--api-key", "sesame") as server:
        key = {"Authorization": "Bearer sesame"}
        for path in (CAPACITY, REQUESTS, f"{REQUESTS}/nope"):
            response = httpx.get(server.url + path)
            assert response.status_code == 401
            assert "fraqtl" not in response.headers and response.json().keys() == {"error"}
        assert httpx.get(server.url + CAPACITY, headers=key).json()["pool_bytes"] > 0
        # A new connection each: the processes share them out.
        answers = [complete(server, headers=key) for _ in range(12)]
        gained = totals(server)
        assert gained["requests"] == gained["observed"] == 12
        for name in SUMS:
            assert gained[name] == sum(answer.json()["fraqtl"][name] for answer in answers)
        assert metric(server.url, "fraqtl:pool_bytes") == POOL_BYTES // BLOCK_BYTES * BLOCK_BYTES
        listed = httpx.get(f"{server.url}{REQUESTS}", headers=key).json()["requests"]
        assert {record["status"] for record in listed} <= {"finished"}
