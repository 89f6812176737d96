"""Haystack's OpenAIChatGenerator: answers, streams, a schema and a tool call."""

from __future__ import annotations

import sys
from typing import Any, Literal

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from pydantic import BaseModel, Field

from tests.clients.seen import ANSWER, MODEL, QUESTION, only_last, places, tell

ASK = [ChatMessage.from_user(QUESTION)]
USAGE = ["_meta.usage.kv_cache"]  # of a reply, which shows `_meta` as `meta`


class Code(BaseModel):
    fruit: Literal["apple", "lemon"]
    code: int = Field(ge=1000, le=9999)


def ask(url: str, options: dict[str, Any], chunks: list[Any] | None = None, **tools: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 99, **options}
    generator = OpenAIChatGenerator(
        Secret.from_token("none"), MODEL, api_base_url=f"{url}/v1", generation_kwargs=options, **tools
    )
    callback = None if chunks is None else chunks.append
    [reply] = generator.run(ASK, streaming_callback=callback)["replies"]
    return reply


def main(url: str) -> None:
    reply = ask(url, {})
    assert reply.text == ANSWER and places(reply) == USAGE, places(reply)
    assert reply.meta["usage"]["kv_cache"]["blocks"] == 3
    Code.model_validate_json(ask(url, {"response_format": Code}).text)
    tool = Tool("look_up", "Looks a code up.", Code.model_json_schema(), print)
    forced = {"tool_choice": {"type": "function", "function": {"name": "look_up"}}}
    [call] = ask(url, forced, tools=[tool]).tool_calls
    Code.model_validate(call.arguments)
    chunks: list[Any] = []
    streamed = ask(url, {}, chunks)
    assert streamed.text == ANSWER and len(chunks) > 5 and places([streamed, chunks]) == []
    chunks.clear()
    streamed = ask(url, {"stream_options": {"include_usage": True}}, chunks)
    assert streamed.text == ANSWER and places(streamed) == USAGE and only_last(chunks), places([streamed, chunks])
    tell("haystack-ai", plain=places(reply), stream=places(streamed))


main(sys.argv[1])
