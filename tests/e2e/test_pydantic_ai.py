"""pydantic-ai's agents against a live server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from pydantic_ai import Agent
from pydantic_ai.agent import AgentRunResult
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.e2e.quiet import no_warnings
from tests.e2e.reports import ANSWER, MODEL, QUESTION
from tests.e2e.server import Server


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with no_warnings():
        yield


@asynccontextmanager
async def agent_of(server: Server) -> AsyncIterator[Agent[None, str]]:
    """An agent whose connections are closed with it: the client that pydantic-ai keeps for a whole process outlives the
    event loop, and warns when it is collected in a later test."""
    async with httpx2.AsyncClient() as client:
        provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none", http_client=client)
        yield Agent(OpenAIChatModel(MODEL, provider=provider), model_settings={"temperature": 0})


async def ask(server: Server) -> AgentRunResult[str]:
    async with agent_of(server) as agent:
        return await agent.run(QUESTION)


def test_plain(demo_server: Server) -> None:
    result = asyncio.run(ask(demo_server))
    assert result.output == ANSWER
    assert result.usage.output_tokens > 5


def test_streaming(demo_server: Server) -> None:
    async def run() -> tuple[str, Any]:
        async with agent_of(demo_server) as agent, agent.run_stream(QUESTION) as result:
            pieces = [piece async for piece in result.stream_text(delta=True)]
            return "".join(pieces), result.usage

    text, usage = asyncio.run(run())
    assert text == ANSWER
    assert usage.output_tokens > 5


def test_report_is_left_out_without_a_word(demo_server: Server) -> None:
    # It keeps the usage that it knows the names of: where that changes, the guide's table can say more.
    usage = asyncio.run(ask(demo_server)).usage
    assert usage.details == {}
    assert not hasattr(usage, "kv_cache")
