"""The `openai` package against a live server: what it can ask for, and what it is told about KV memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from math import ceil
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from openai import OpenAI

from fraqtl_serve.cli.serve import DEMO_MODEL
from tests.e2e.reports import (
    ANSWER,
    BLOCK_SIZE,
    MODEL,
    QUESTION,
    check,
    check_mirror,
    check_sequence,
    messages,
)
from tests.e2e.server import Server

WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
STREAMS = [pytest.param({"stream": True}, id="plain"), pytest.param(WITH_USAGE, id="include_usage")]
GO_ON = {"ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {
        "code": {"type": "integer", "minimum": 1000, "maximum": 9999},
        "fruit": {"enum": ["apple", "lemon"]},
    },
    "required": ["code", "fruit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "strict": True, "parameters": SCHEMA}}
CALL: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look_up"}}}


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: OpenAI, question: str = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages(question), **{"temperature": 0, **options})


def complete(client: OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, **options})


def the_report(chunks: list[Any]) -> dict[str, Any]:
    """The report of a stream: on its last chunk, and on no other."""
    assert [i for i, chunk in enumerate(chunks) if "fraqtl" in (chunk.model_extra or {})] == [len(chunks) - 1]
    report: dict[str, Any] = chunks[-1].fraqtl
    return report


def no_spaces() -> dict[str, int]:
    """A logit bias against single white space, which JSON allows between its parts without end."""
    vocabulary = json.loads((DEMO_MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    return {str(vocabulary[token]): -100 for token in "ĠĊĉč" if token in vocabulary}


@pytest.mark.smoke
def test_chat(client: OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    check_sequence(answer.fraqtl, answer.usage)
    check_mirror(answer.usage.kv_cache, answer.fraqtl)


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32])
@pytest.mark.parametrize("generated", [1, 2])
def test_blocks_are_counted_to_the_token(client: OpenAI, length: int, generated: int) -> None:
    prompt = list(range(100, 100 + length))
    answer = complete(client, prompt, max_tokens=generated, extra_body=GO_ON)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, generated)
    tokens = length + generated - 1
    check(answer.fraqtl, tokens=tokens, blocks=ceil(tokens / BLOCK_SIZE))
    check_mirror(answer.usage.kv_cache, answer.fraqtl)


def test_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=messages(), temperature=0)
    report: Any = raw.parse().model_extra
    assert raw.headers["x-fraqtl-kv-bytes"] == str(report["fraqtl"]["bytes"])
    assert raw.headers["x-fraqtl-kv-saved-bytes"] == str(report["fraqtl"]["saved_bytes"])


@pytest.mark.smoke
def test_a_repeated_prompt_shares_its_blocks(client: OpenAI) -> None:
    question = "The code for barley is 3377. " * 20 + "\nWhat is the code for barley?"
    first, second = (ask(client, question, max_tokens=4) for _ in range(2))
    whole_blocks = (first.usage.prompt_tokens - 1) // BLOCK_SIZE
    assert whole_blocks > 10
    assert first.fraqtl["shared_blocks"] <= 1  # other tests may have begun with the same few words
    assert second.fraqtl["shared_blocks"] == whole_blocks
    check_sequence(second.fraqtl, second.usage)


@pytest.mark.smoke
@pytest.mark.parametrize("stream", STREAMS)
def test_chat_stream(client: OpenAI, stream: dict[str, Any]) -> None:
    chunks = list(ask(client, **stream))
    report = the_report(chunks)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == ANSWER
    last_words = next(chunk for chunk in reversed(chunks) if chunk.choices)
    assert last_words.choices[0].finish_reason == "stop"
    if stream is WITH_USAGE:
        assert [chunk.choices == [] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        check_sequence(report, chunks[-1].usage)
        check_mirror(chunks[-1].usage.kv_cache, report)
    else:
        assert all(chunk.choices and chunk.usage is None for chunk in chunks)
        check(report, tokens=report["tokens"], blocks=ceil(report["tokens"] / BLOCK_SIZE))


@pytest.mark.parametrize("stream", STREAMS)
def test_completions_stream(client: OpenAI, stream: dict[str, Any]) -> None:
    chunks = list(complete(client, "my neighbour", max_tokens=6, extra_body=GO_ON, **stream))
    report = the_report(chunks)
    plain = complete(client, "my neighbour", max_tokens=6, extra_body=GO_ON)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == plain.choices[0].text
    check_sequence(report, plain.usage)
    assert [chunk.choices == [] for chunk in chunks].count(True) == (stream is WITH_USAGE)


def test_the_naive_loop(client: OpenAI) -> None:
    text = ""
    for chunk in ask(client, stream=True):
        text += chunk.choices[0].delta.content or ""  # what half of all programs do
    assert text == ANSWER


def test_every_event_is_a_plain_chunk(demo_server: Server) -> None:
    body = {"model": MODEL, "messages": messages(), "temperature": 0, **WITH_USAGE}
    response = httpx.post(f"{demo_server.url}/v1/chat/completions", json=body, timeout=120)
    *events, end, rest = response.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("kv_transfer_params" not in chunk or chunk["kv_transfer_params"] is None for chunk in chunks)


@pytest.mark.parametrize("stream", STREAMS)
def test_the_stream_helper(client: OpenAI, stream: dict[str, Any]) -> None:
    options = {key: value for key, value in stream.items() if key != "stream"}
    with client.chat.completions.stream(model=MODEL, messages=messages(), temperature=0, **options) as helper:
        events = list(helper)
        final = helper.get_final_completion()
    assert final.choices[0].message.content == ANSWER
    if options:
        assert final.usage is not None and final.usage.model_extra is not None
        assert final.usage.model_extra["kv_cache"]["bytes"] > 0
    reported = [event for event in events if event.type == "chunk" and "fraqtl" in (event.chunk.model_extra or {})]
    assert len(reported) == 1


@pytest.mark.parametrize("stream", [pytest.param({}, id="no stream"), *STREAMS])
def test_two_answers_count_their_prompt_once(client: OpenAI, stream: dict[str, Any]) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1, "max_tokens": 5, "extra_body": GO_ON}
    answer = complete(client, list(range(500, 540)), **options, **stream)
    if stream:
        chunks = list(answer)
        report, choices = the_report(chunks), [choice for chunk in chunks for choice in chunk.choices]
    else:
        report, choices = answer.fraqtl, answer.choices
    assert sorted(c.index for c in choices if c.finish_reason == "length") == [0, 1]
    check(report, tokens=2 * (40 + 5 - 1), blocks=2 + 2)  # two blocks full of prompt, then one each


@pytest.mark.parametrize("stream", STREAMS)
def test_two_chat_answers_in_one_stream(client: OpenAI, stream: dict[str, Any]) -> None:
    chunks = list(ask(client, n=2, temperature=1, max_tokens=8, **stream))
    the_report(chunks)
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == [0, 1]


@pytest.mark.parametrize("stream", [pytest.param({}, id="no stream"), *STREAMS])
def test_several_prompts_in_one_call(client: OpenAI, stream: dict[str, Any]) -> None:
    prompts = [list(range(600, 617)), list(range(700, 705))]
    answer = complete(client, prompts, max_tokens=3, extra_body=GO_ON, **stream)
    if stream:
        chunks = list(answer)
        report, indices = the_report(chunks), {choice.index for chunk in chunks for choice in chunk.choices}
    else:
        report, indices = answer.fraqtl, {choice.index for choice in answer.choices}
    assert indices == {0, 1}
    check(report, tokens=(17 + 2) + (5 + 2), blocks=2 + 1)


def test_beams_count_as_they_were_in_the_end(client: OpenAI) -> None:
    options: dict[str, Any] = {"n": 2, "max_tokens": 5, "extra_body": {"use_beam_search": True, **GO_ON}}
    answer = complete(client, list(range(800, 840)), **options)
    check(answer.fraqtl, tokens=2 * (40 + 5 - 1), blocks=2 + 2)
    chunks = list(ask(client, n=3, max_tokens=6, stream=True, extra_body={"use_beam_search": True}))
    the_report(chunks)


def test_token_ids_and_their_text_are_the_same_prompt(client: OpenAI, demo_server: Server) -> None:
    body = {"model": MODEL, "prompt": "the farmer carried"}
    ids = httpx.post(f"{demo_server.url}/tokenize", json=body, timeout=60).json()["tokens"]
    from_text, from_ids = (complete(client, prompt, max_tokens=8) for prompt in (body["prompt"], ids))
    assert from_ids.usage.prompt_tokens == len(ids) == from_text.usage.prompt_tokens
    assert from_ids.choices[0].text == from_text.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(client: OpenAI, stream: bool) -> None:
    answer = ask(client, stop=[" is"], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        end, report = chunks[-1].choices[0], the_report(chunks)
    else:
        text, end, report = answer.choices[0].message.content, answer.choices[0], answer.fraqtl
        check_sequence(report, answer.usage)
    assert (text, end.finish_reason, end.stop_reason) == ("The code for apple", "stop", " is")
    assert report["blocks"] == ceil(report["tokens"] / BLOCK_SIZE)


def test_seed(client: OpenAI) -> None:
    # Shorter than a block: with a prefix found in the cache, rounding could tip a close choice.
    texts = [
        complete(client, [300, 301, 302], temperature=1, seed=seed, max_tokens=12, extra_body=GO_ON).choices[0].text
        for seed in (1, 2, 3, 1, 2, 3)
    ]
    assert texts[:3] == texts[3:]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties(client: OpenAI, penalty: str) -> None:
    def distinct_tokens(value: float) -> int:
        options: dict[str, Any] = {"max_tokens": 50, "logprobs": 0, "extra_body": GO_ON, penalty: value}
        return len(Counter(complete(client, [300, 301, 302], **options).choices[0].logprobs.tokens))

    assert distinct_tokens(2) > distinct_tokens(-2)


def test_chat_logprobs(client: OpenAI) -> None:
    answer = ask(client, max_tokens=5, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        likely = [other.logprob for other in token.top_logprobs]
        assert len(likely) == 3
        assert 0 >= likely[0] >= likely[1] >= likely[2]
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, likely[0])
    check_sequence(answer.fraqtl, answer.usage)


def test_completions_logprobs_of_the_prompt(client: OpenAI) -> None:
    answer = complete(client, "the farmer", max_tokens=2, logprobs=1, echo=True)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == answer.usage.total_tokens
    assert logprobs.token_logprobs[0] is None  # nothing comes before the first token
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    check_sequence(answer.fraqtl, answer.usage)


def test_json_schema(client: OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "code", "schema": SCHEMA, "strict": True}}
    answer = ask(client, response_format=schema, max_tokens=100, logit_bias=no_spaces())
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    check_sequence(answer.fraqtl, answer.usage)


def test_forced_tool_call(client: OpenAI) -> None:
    answer = ask(client, max_tokens=200, logit_bias=no_spaces(), **CALL)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "look_up"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    check_sequence(answer.fraqtl, answer.usage)


def test_forced_tool_call_in_a_stream(client: OpenAI) -> None:
    chunks = list(ask(client, max_tokens=200, logit_bias=no_spaces(), **CALL, **WITH_USAGE))
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function.name] == ["look_up"]
    jsonschema.validate(json.loads("".join(call.function.arguments or "" for call in calls)), SCHEMA)
    check_sequence(the_report(chunks), chunks[-1].usage)


def test_models(client: OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 8192


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30)
    assert answer.output_text == ANSWER
    assert answer.status == "completed"
    check_response(answer)


def check_response(answer: Any) -> None:
    tokens = answer.usage.input_tokens + answer.usage.output_tokens - 1
    check(answer.fraqtl, tokens=tokens, blocks=ceil(tokens / BLOCK_SIZE))
    check_mirror(answer.usage.kv_cache, answer.fraqtl)


def test_responses_headers(client: OpenAI) -> None:
    raw = client.responses.with_raw_response.create(model=MODEL, input=QUESTION, max_output_tokens=3)
    report: Any = raw.parse().model_extra
    assert raw.headers["x-fraqtl-kv-bytes"] == str(report["fraqtl"]["bytes"])
    assert raw.headers["x-fraqtl-kv-saved-bytes"] == str(report["fraqtl"]["saved_bytes"])


def test_responses_stream(client: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_output_tokens": 30, "stream": True}
    events = list(client.responses.create(model=MODEL, input=QUESTION, **options))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert [event.type for event in events].count("response.completed") == 1
    assert events[-1].type == "response.completed"
    check_response(events[-1].response)
    assert [i for i, event in enumerate(events) if '"fraqtl":' in event.model_dump_json()] == [len(events) - 1]


def test_responses_stream_helper(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        final = stream.get_final_response()
    assert final.output_text == ANSWER
    check_response(final)


def test_batch_of_conversations(demo_server: Server) -> None:
    body = {"model": MODEL, "messages": [messages(), messages("hello")], "temperature": 0, "max_tokens": 20}
    response = httpx.post(f"{demo_server.url}/v1/chat/completions/batch", json=body, timeout=120)
    answer = response.json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["message"]["content"] == ANSWER
    report = answer["fraqtl"]
    check(report, tokens=answer["usage"]["total_tokens"] - 2, blocks=report["blocks"])
    check_mirror(answer["usage"]["kv_cache"], report)
    assert response.headers["x-fraqtl-kv-bytes"] == str(report["bytes"])
