"""LlamaIndex's OpenAILike: chats, completions, streams and structured answers."""

from __future__ import annotations

import sys
from typing import Any, Literal

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

from tests.clients.seen import ANSWER, MODEL, QUESTION, only_last, places, tell

ASK = [ChatMessage(role="user", content=QUESTION)]
WHOLE = ["raw.fraqtl", "raw.usage.kv_cache"]


class Code(BaseModel):
    """The code of a fruit."""

    fruit: Literal["apple", "lemon"]
    code: int = Field(ge=1000, le=9999)


def llm(url: str, **options: Any) -> OpenAILike:
    common: dict[str, Any] = {"api_key": "none", "temperature": 0, "max_tokens": 99, "is_chat_model": True}
    return OpenAILike(model=MODEL, api_base=f"{url}/v1", **common, **options)


def main(url: str) -> None:
    for answer in (llm(url).chat(ASK).message.content, llm(url).complete(QUESTION).text):
        assert answer == ANSWER
    plain = places(llm(url).chat(ASK))
    assert plain == places(llm(url).complete(QUESTION)) == WHOLE, plain
    with_usage = {"stream_options": {"include_usage": True}}
    for extra, shown in (({}, WHOLE[:1]), (with_usage, WHOLE)):
        chunks = list(llm(url, additional_kwargs=extra).stream_chat(ASK))
        assert chunks[-1].message.content == ANSWER and only_last(chunks)
        assert places(chunks[-1]) == shown, places(chunks)
    for kind in ({"is_function_calling_model": True}, {"should_use_structured_outputs": True}):
        found = llm(url, **kind).as_structured_llm(Code).chat(ASK)
        assert isinstance(found.raw, Code) and places(found) == [], places(found)
    tell("llama-index-llms-openai-like", plain=plain, stream=shown, structured=[])


main(sys.argv[1])
