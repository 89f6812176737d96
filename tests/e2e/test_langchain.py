"""LangChain's ChatOpenAI against a live server: it warns of anything in `usage` that it can't add up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk, BaseMessage, HumanMessage
from langchain_openai import ChatOpenAI

from tests.e2e.quiet import no_warnings
from tests.e2e.reports import ANSWER, COUNTS, MODEL, QUESTION
from tests.e2e.server import Server


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with no_warnings():
        yield


def chat(server: Server, **options: Any) -> ChatOpenAI:
    common: dict[str, Any] = {"api_key": "none", "temperature": 0, "max_retries": 0, "timeout": 120}
    return ChatOpenAI(model=MODEL, base_url=f"{server.url}/v1", **common, **options)


def test_plain(demo_server: Server) -> None:
    answer = chat(demo_server, include_response_headers=True).invoke(QUESTION)
    assert answer.content == ANSWER
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 5
    kv_cache = answer.response_metadata["token_usage"]["kv_cache"]
    assert kv_cache.keys() == COUNTS
    headers = answer.response_metadata["headers"]
    assert headers["x-fraqtl-kv-bytes"] == str(kv_cache["bytes"])
    assert headers["x-fraqtl-kv-saved-bytes"] == str(kv_cache["saved_bytes"])


@pytest.mark.parametrize("with_usage", [False, True])
def test_streaming(demo_server: Server, with_usage: bool) -> None:
    chunks = list(chat(demo_server, stream_usage=with_usage).stream(QUESTION))
    assert len(chunks) > 5
    answer: AIMessageChunk = reduce(add, chunks)
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    assert (answer.usage_metadata is not None) == with_usage
    assert "kv_cache" not in f"{answer.usage_metadata} {answer.response_metadata}"  # as the guide's table says


def test_batch(demo_server: Server) -> None:
    answers = chat(demo_server).batch([QUESTION] * 3)
    assert [answer.content for answer in answers] == [ANSWER] * 3


def test_usage_is_summed_over_a_batch(demo_server: Server) -> None:
    questions: list[list[BaseMessage]] = [[HumanMessage(QUESTION)]] * 3
    result = chat(demo_server).generate(questions)
    each = [batch[0].message.response_metadata["token_usage"] for batch in result.generations]  # type: ignore[union-attr]
    assert result.llm_output is not None
    total = result.llm_output["token_usage"]
    assert total["total_tokens"] == sum(usage["total_tokens"] for usage in each)
    for key in COUNTS:
        assert total["kv_cache"][key] == sum(usage["kv_cache"][key] for usage in each)
