"""Answers that the server ends before their time still say what they held. Behind a prefix, as behind a proxy."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.reports import ANSWER, MODEL, check, messages, metric
from tests.e2e.server import Server, forked

CHAT = "/v1/chat/completions"
ENDLESS: dict[str, Any] = {"model": MODEL, "messages": messages("hi"), "max_tokens": 6000, "ignore_eos": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
PREFIX = "/v"
LATE_STEPS = 12  # in test_accounts.py the count is exact: nothing is cut off there


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with forked("--root-path", PREFIX, environment={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        yield server


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("how", ["/pause?mode=abort", "/abort_requests"])
def test_aborted_answers_say_what_they_held(server: Server, how: str) -> None:
    jobs = [
        (CHAT, ENDLESS),
        (CHAT, {**ENDLESS, "n": 2}),
        (CHAT, {**ENDLESS, "stream": True}),
        (CHAT, {**ENDLESS, "n": 2, **USAGE}),
        (CHAT, {**ENDLESS, "stop": ["not to be found"]}),
        ("/v1/completions", {"model": MODEL, "prompt": ["a b", "c"], "max_tokens": 6000, "ignore_eos": True}),
    ]
    # Ends by itself after 35 tokens: this API knows no ignore_eos. So it comes last, again if it was too fast for us.
    short = ("/v1/messages", {"model": MODEL, "messages": messages("hi"), "max_tokens": 6000})
    before, made = (metric(server.url, name) for name in ("fraqtl:requests_total", "vllm:generation_tokens_total"))
    with ThreadPoolExecutor(len(jobs) + 1) as pool, httpx.Client(base_url=server.url, timeout=120) as client:
        answers = [pool.submit(client.post, path, json=job) for path, job in jobs]
        while (
            metric(server.url, "vllm:num_requests_running", client) < 9
            or metric(server.url, "vllm:generation_tokens_total", client) < made + 30
        ):
            time.sleep(0.02)
        jobs.append(short)
        tries = [pool.submit(client.post, short[0], json=short[1])]
        while metric(server.url, "vllm:num_requests_running", client) < 10:
            if tries[-1].done():
                tries.append(pool.submit(client.post, short[0], json=short[1]))
            time.sleep(0.02)
        client.post(how, json={}).raise_for_status()
        given = [answer.result() for answer in [*answers, tries[-1]]]
        client.post("/resume").raise_for_status()
        sent = len(answers) + len(tries)
        assert metric(server.url, "fraqtl:requests_total", client) - before == sent
        listed = client.get("/plugins/fraqtl/requests", params={"limit": len(jobs)}).json()["requests"]
    assert [item["status"] for item in listed] == ["aborted"] * len(jobs)
    for (path, job), response in zip(jobs, given, strict=True):
        assert response.status_code == 200, response.text
        if job.get("stream"):
            events = events_of(response.text)
            reasons = [c["finish_reason"] for e in events for c in e["choices"] if c.get("finish_reason")]
            empty = [c for e in events for c in e["choices"] if not c["delta"] and c.get("finish_reason") is None]
            assert (reasons, empty) == (["abort"] * job.get("n", 1), [])
            [report] = [event["fraqtl"] for event in events if "fraqtl" in event]
        else:
            answer = response.json()
            report = answer["fraqtl"]
            if path != "/v1/messages":
                assert {choice["finish_reason"] for choice in answer["choices"]} == {"abort"}
                sequences = len(answer["choices"])
                # The engine may have written tokens that the answer no longer got: as many as it makes steps before
                # it hears of the end, which is one or two, and more where the machine has other work.
                usage = answer["usage"]
                written = usage["total_tokens"] + (job.get("n", 1) - 1) * usage["prompt_tokens"] - sequences
                assert written <= report["tokens"] <= written + LATE_STEPS * sequences
        assert report in [item["report"] for item in listed]


def test_a_paused_engine_answers_for_what_is_aborted_meanwhile(server: Server) -> None:
    """It makes no step that could send the account."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", CHAT, json={**ENDLESS, **USAGE}) as response:
            lines = (line for line in response.iter_lines() if line)
            first = [next(lines) for _ in range(20)]
            httpx.post(f"{server.url}/pause?mode=keep&clear_cache=false", timeout=60).raise_for_status()
            httpx.post(f"{server.url}/abort_requests", json={}, timeout=60).raise_for_status()
            events = events_of("\n".join([*first, *lines]))
        client.post("/resume").raise_for_status()
    assert [c["finish_reason"] for e in events for c in e["choices"] if c.get("finish_reason")] == ["abort"]
    assert events[-1]["usage"]["completion_tokens"] >= 18
    assert events[-1]["fraqtl"]["tokens"] >= events[-1]["usage"]["total_tokens"] - 1


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_reports_with_the_prefix_and_without(server: Server, prefix: str) -> None:
    asked = {"model": MODEL, "messages": messages(), "max_tokens": 30, "temperature": 0}
    assert httpx.get(f"{server.url}{prefix}/health").status_code == 200
    chat = httpx.post(f"{server.url}{prefix}{CHAT}", json=asked, timeout=60).json()
    assert chat["choices"][0]["message"]["content"] == ANSWER
    message = httpx.post(f"{server.url}{prefix}/v1/messages", json=asked, timeout=60).json()
    assert message["content"][0]["text"] == ANSWER
    tokens = chat["usage"]["total_tokens"] - 1
    for answer in (chat, message):
        check(answer["fraqtl"], tokens=tokens, blocks=-(-tokens // 16))
