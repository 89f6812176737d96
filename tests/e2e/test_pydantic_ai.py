"""pydantic-ai's agents against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.e2e.quiet import no_warnings
from tests.e2e.reports import ANSWER, MODEL, QUESTION
from tests.e2e.server import Server


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with no_warnings():
        yield


def make_agent(server: Server) -> Agent[None, str]:
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    return Agent(OpenAIChatModel(MODEL, provider=provider), model_settings={"temperature": 0})


def test_plain(demo_server: Server) -> None:
    result = make_agent(demo_server).run_sync(QUESTION)
    assert result.output == ANSWER
    assert result.usage.output_tokens > 5


def test_streaming(demo_server: Server) -> None:
    async def run() -> tuple[str, Any]:
        async with make_agent(demo_server).run_stream(QUESTION) as result:
            pieces = [piece async for piece in result.stream_text(delta=True)]
            return "".join(pieces), result.usage

    text, usage = asyncio.run(run())
    assert text == ANSWER
    assert usage.output_tokens > 5


def test_report_is_left_out_without_a_word(demo_server: Server) -> None:
    # It keeps the usage that it knows the names of: where that changes, the guide's table can say more.
    usage = make_agent(demo_server).run_sync(QUESTION).usage
    assert usage.details == {}
    assert not hasattr(usage, "kv_cache")
