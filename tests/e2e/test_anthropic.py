"""The `anthropic` package against a live server."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.e2e.reports import ANSWER, BLOCK_SIZE, MODEL, check, check_mirror, messages
from tests.e2e.server import Server

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=demo_server.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def check_report(carrier: Any, usage: Any) -> None:
    tokens = usage.input_tokens + usage.output_tokens - 1
    check(carrier.fraqtl, tokens=tokens, blocks=ceil(tokens / BLOCK_SIZE))
    check_mirror(carrier.usage.kv_cache, carrier.fraqtl)


def test_message(client: Anthropic) -> None:
    message = client.messages.create(model=MODEL, messages=messages(), max_tokens=30, extra_body=GREEDY)
    assert [block.text for block in message.content if block.type == "text"] == [ANSWER]
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 20
    assert message.usage.output_tokens > 5
    check_report(message, message.usage)


def test_headers(client: Anthropic) -> None:
    raw = client.messages.with_raw_response.create(model=MODEL, messages=messages(), max_tokens=3)
    report: Any = raw.parse().model_extra
    assert raw.headers["x-fraqtl-kv-bytes"] == str(report["fraqtl"]["bytes"])
    assert raw.headers["x-fraqtl-kv-saved-bytes"] == str(report["fraqtl"]["saved_bytes"])


def test_stream_helper(client: Anthropic) -> None:
    with client.messages.stream(model=MODEL, messages=messages(), max_tokens=30, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == ANSWER
        message = stream.get_final_message()
    assert not message.model_extra  # as the guide's table says: the helper drops the report
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 5


def test_stream_of_events(client: Anthropic) -> None:
    options: dict[str, Any] = {"extra_body": GREEDY, "stream": True}
    events = list(client.messages.create(model=MODEL, messages=messages(), max_tokens=30, **options))
    kinds = [event.type for event in events]
    outline = [kind for kind in kinds if kind != "content_block_delta"]
    assert outline == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_delta") > 5
    [carrier] = [event for event in events if "fraqtl" in (event.model_extra or {})]
    assert carrier.type == "message_delta"
    check_report(carrier, carrier.usage)


def test_length_limit(client: Anthropic) -> None:
    message = client.messages.create(model=MODEL, messages=messages(), max_tokens=3, extra_body=GREEDY)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 3


def test_unknown_model(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nope") as caught:
        client.messages.create(model="nope", messages=messages(), max_tokens=3)
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"
