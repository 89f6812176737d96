"""Ids that clients choose: they tell nothing about whose tokens are whose."""

from __future__ import annotations

import asyncio
import json
from math import ceil
from typing import Any

import httpx

from tests.e2e.reports import BLOCK_SIZE, MODEL, check, messages, metric
from tests.e2e.server import Server

CHAT = "/v1/chat/completions"
LOOKS_LIKE_A_BEAM = "p-0123456789abcdef-beam-1"
ROUNDS = 10


def body(max_tokens: int, **options: Any) -> dict[str, Any]:
    fixed = {"model": MODEL, "messages": messages("hi"), "ignore_eos": True, "max_tokens": max_tokens}
    return {**fixed, **options}


def the_report(response: httpx.Response) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report and usage of an answer, streamed or not."""
    assert response.status_code == 200, response.text
    if not response.text.startswith("data: "):
        answer = response.json()
        return answer["fraqtl"], answer["usage"]
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    [event] = [event for event in events if "fraqtl" in event]
    return event["fraqtl"], event["usage"]


def test_eight_at_a_time_with_one_id(demo_server: Server) -> None:
    url = demo_server.url
    before = metric(url, "fraqtl:requests_total")

    async def run() -> list[list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=url, headers={"X-Request-Id": "same"}, timeout=120) as client:
            streamed = {"stream": True, "stream_options": {"include_usage": True}}
            found = []
            for turn in range(ROUNDS):
                jobs = [body(3 + 8 * i, n=1 + i % 2, **(streamed if turn % 2 else {})) for i in range(8)]
                found.append(await asyncio.gather(*(client.post(CHAT, json=job) for job in jobs)))
            return found

    for answers in asyncio.run(run()):
        for i, answer in enumerate(answers):
            report, usage = the_report(answer)
            n = 1 + i % 2
            tokens = usage["prompt_tokens"] + usage["completion_tokens"] // n - 1
            assert usage["completion_tokens"] == n * (3 + 8 * i)
            assert report["tokens"] == n * tokens, (i, report, usage)
            full = usage["prompt_tokens"] // BLOCK_SIZE  # blocks that two sequences share
            assert report["blocks"] == n * ceil(tokens / BLOCK_SIZE) - (n - 1) * full, (i, report, usage)
    assert metric(url, "fraqtl:requests_total") - before == 8 * ROUNDS
    listed = httpx.get(f"{url}/plugins/fraqtl/requests", params={"limit": 8 * ROUNDS}).json()["requests"]
    assert [item["id"] for item in listed] == ["chatcmpl-same"] * 8 * ROUNDS


def test_id_that_looks_like_a_beam(demo_server: Server) -> None:
    headers = {"X-Request-Id": LOOKS_LIKE_A_BEAM}
    report, usage = the_report(httpx.post(demo_server.url + CHAT, json=body(10, n=2), headers=headers, timeout=60))
    assert report["tokens"] == 2 * (usage["prompt_tokens"] + 9)
    # And beams that are some, of two prompts.
    prompts = [list(range(800, 840)), list(range(900, 920))]
    search = {"model": MODEL, "prompt": prompts, "n": 2, "max_tokens": 5, "use_beam_search": True, "ignore_eos": True}
    answer = httpx.post(f"{demo_server.url}/v1/completions", json=search, headers=headers, timeout=60).json()
    assert answer["id"] == f"cmpl-{LOOKS_LIKE_A_BEAM}"
    check(answer["fraqtl"], tokens=2 * (40 + 4) + 2 * (20 + 4), blocks=(2 + 2) + (1 + 2))  # shared, own


def test_id_of_200_kilobytes(demo_server: Server) -> None:
    report, usage = the_report(httpx.post(demo_server.url + CHAT, json=body(10, request_id="x" * 200_000), timeout=60))
    assert report["tokens"] == usage["prompt_tokens"] + 9
    [record] = httpx.get(f"{demo_server.url}/plugins/fraqtl/requests", params={"limit": 1}).json()["requests"]
    assert record["report"] == report
    assert len(record["id"]) == 256
    again = httpx.get(f"{demo_server.url}/plugins/fraqtl/requests/{record['id']}").json()
    assert again == record
