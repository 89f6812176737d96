"""The `anthropic` package against a live server."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from anthropic import Anthropic

from tests.e2e.reports import ANSWER, MODEL, messages
from tests.e2e.server import Server

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=demo_server.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_message(client: Anthropic) -> None:
    message = client.messages.create(model=MODEL, messages=messages(), max_tokens=30, extra_body=GREEDY)
    assert [block.text for block in message.content if block.type == "text"] == [ANSWER]
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 20
    assert message.usage.output_tokens > 5


def test_stream_helper(client: Anthropic) -> None:
    with client.messages.stream(model=MODEL, messages=messages(), max_tokens=30, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == ANSWER
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 5


def test_stream_of_events(client: Anthropic) -> None:
    events = client.messages.create(model=MODEL, messages=messages(), max_tokens=30, extra_body=GREEDY, stream=True)
    kinds = [event.type for event in events]
    outline = [kind for kind in kinds if kind != "content_block_delta"]
    assert outline == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_delta") > 5


def test_length_limit(client: Anthropic) -> None:
    message = client.messages.create(model=MODEL, messages=messages(), max_tokens=3, extra_body=GREEDY)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 3


def test_unknown_model(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="nope"):
        client.messages.create(model="nope", messages=messages(), max_tokens=3)
