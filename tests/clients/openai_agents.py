"""OpenAI Agents SDK: both of its models, with and without its own setting that keeps the usage as it came."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled as tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.clients.seen import ANSWER, MODEL, QUESTION, places, tell

KEPT = ["[].raw_usage.kv_cache"]
IN_EVENTS = ["[].data.response.fraqtl", "[].data.response.usage.kv_cache"]
calls: list[str] = []


class Code(BaseModel):
    fruit: Literal["apple"]
    code: int


def look_up(fruit: Literal["apple", "lemon"]) -> str:
    calls.append(fruit)
    return "4821"


def agent(model: Any, settings: dict[str, Any], **options: Any) -> Agent[None]:
    return Agent("reader", model=model, model_settings=ModelSettings(temperature=0, **settings), **options)


async def check(model: Any) -> dict[str, list[str]]:
    """Asks in all its ways. What shows in the end, with the usage kept, and in the events of a stream without."""
    for keep, shown in ((False, []), (True, KEPT)):
        reader = agent(model, {"preserve_raw_usage": keep, "include_usage": True})
        whole = await Runner.run(reader, QUESTION)
        assert whole.final_output == ANSWER and places(whole.raw_responses) == shown, places(whole)
        stream = Runner.run_streamed(reader, QUESTION)
        events = [event async for event in stream.stream_events()]
        assert stream.final_output == ANSWER and places(stream.raw_responses) == shown, places(stream)
        if not keep:
            in_events = places(events)
    bare = Runner.run_streamed(agent(model, {"preserve_raw_usage": True}), QUESTION)
    assert [event async for event in bare.stream_events()]
    found = await Runner.run(agent(model, {"max_tokens": 99}, output_type=Code), QUESTION)
    assert isinstance(found.final_output, Code), found.final_output
    calls.clear()
    await Runner.run(
        agent(model, {"tool_choice": "look_up", "max_tokens": 99}, tools=[function_tool(look_up)]), QUESTION
    )
    assert calls and {*calls} <= {"apple", "lemon"}, calls
    results = {"plain": whole, "stream": stream, "bare_stream": bare}
    return {name: places(result.raw_responses) for name, result in results.items()} | {"events": in_events}


async def main(url: str) -> None:
    tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    chat = await check(OpenAIChatCompletionsModel(MODEL, client))
    responses = await check(OpenAIResponsesModel(MODEL, client))
    assert (chat["events"], responses["events"]) == ([], IN_EVENTS), (chat, responses)
    # Chat has usage in a stream only where it's asked for.
    assert (chat["bare_stream"], responses["bare_stream"]) == ([], KEPT), (chat, responses)
    tell("openai-agents", plain=chat["plain"], stream=chat["stream"], responses_events=responses["events"])


asyncio.run(main(sys.argv[1]))
