"""The middleware around a small Starlette application; only the engine behind it is fake."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fraqtl_serve.http.streams import ChunkDecorator
from fraqtl_serve.reports.report import Ledger
from tests.serve.fake_engine import FakeEngine, account
from tests.serve.small_app import ACCOUNTS, CHAT, Answer, ask, compact, make_app, make_scope, messages, never

COUNTS = {
    "tokens": 20,
    "blocks": 2,
    "shared_blocks": 0,
    "loaded_blocks": 0,
    "bytes": 4352,
    "baseline_bytes": 16384,
    "saved_bytes": 12032,
    "state_bytes": 0,
}
REPORT = {**COUNTS, "version": 1, "block_size": 16, "kv_format": "k4v4", "ratio": 3.7647}
# The second sequence shares block 1 with the first: three blocks.
REPORT_OF_TWO = {**REPORT, "tokens": 42, "blocks": 3, "bytes": 6528, "baseline_bytes": 24576, "saved_bytes": 18048}
DONE = b"data: [DONE]\n\n"


def sse(payload: dict[str, Any]) -> bytes:
    return b"data: " + compact(payload) + b"\n\n"


def chunk(text: str, *, index: int = 0, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


USAGE_CHUNK = {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 16}}
PLAIN_STREAM = [sse(chunk("Grüß")), sse(chunk(" 😀\n\n", finish="stop")), DONE]
USAGE_STREAM = [*PLAIN_STREAM[:2], sse(USAGE_CHUNK), DONE]


def stream_of(pieces: Iterable[bytes]) -> Callable[[], Response]:
    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return lambda: StreamingResponse(body(), media_type="text/event-stream")


def with_report(event: bytes, report: dict[str, Any] = REPORT) -> dict[str, Any]:
    """What the payload of `event` must have become, written out."""
    payload: dict[str, Any] = {**json.loads(event.removeprefix(b"data: ")), "fraqtl": report}
    if payload.get("usage"):
        payload["usage"]["kv_cache"] = {key: report[key] for key in COUNTS}
    return payload


def check_decorated(out: bytes, events: list[bytes], where: int | None, report: dict[str, Any] = REPORT) -> None:
    """`out` is `events`, byte for byte, but for the report in event number `where`."""
    got = [event + b"\n\n" for event in out.split(b"\n\n")[:-1]]
    assert len(got) == len(events)
    for number, (event, expected) in enumerate(zip(got, events, strict=True)):
        if number == where:
            assert json.loads(event.removeprefix(b"data: ")) == with_report(expected, report)
        else:
            assert event == expected


# ---- JSON responses


def test_json_body_and_headers() -> None:
    answer = ask(make_app(lambda: JSONResponse({"id": "chatcmpl-1", "usage": {"prompt_tokens": 5}})))
    assert answer.json == {
        "id": "chatcmpl-1",
        "usage": {"prompt_tokens": 5, "kv_cache": COUNTS},
        "fraqtl": REPORT,
    }
    assert answer.headers["x-fraqtl-kv-bytes"] == "4352"
    assert answer.headers["x-fraqtl-kv-saved-bytes"] == "12032"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert answer.headers["content-type"] == "application/json"


def test_json_body_without_usage() -> None:
    answer = ask(make_app(lambda: JSONResponse({"id": "cmpl-1", "usage": None})), path="/v1/completions")
    assert answer.json == {"id": "cmpl-1", "usage": None, "fraqtl": REPORT}


def test_text_of_the_answer_is_untouched() -> None:
    text = 'Grüß 😀 "quoted" \\n </s>\u2028'
    answer = ask(make_app(lambda: JSONResponse({"text": text})))
    assert answer.json["text"] == text
    assert answer.headers["content-length"] == str(len(answer.body))


def test_json_body_that_comes_in_pieces() -> None:
    whole = compact({"text": "Grüß", "usage": {}})

    async def body() -> AsyncIterator[bytes]:
        for i in range(len(whole)):
            yield whole[i : i + 1]

    answer = ask(make_app(lambda: StreamingResponse(body(), media_type="application/json; charset=utf-8")))
    assert answer.json == {"text": "Grüß", "usage": {"kv_cache": COUNTS}, "fraqtl": REPORT}
    assert answer.headers["content-length"] == str(len(answer.body))


def test_two_sequences_make_one_report() -> None:
    assert ask(make_app(lambda: JSONResponse({})), {"n": 2}).json == {"fraqtl": REPORT_OF_TWO}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch"])
def test_other_endpoints_say_the_same(path: str) -> None:
    answer = ask(make_app(lambda: JSONResponse({"usage": {"output_tokens": 3}})), path=path)
    assert answer.json == {"usage": {"output_tokens": 3, "kv_cache": COUNTS}, "fraqtl": REPORT}
    assert answer.headers["x-fraqtl-kv-bytes"] == "4352"
    assert answer.headers["x-fraqtl-kv-saved-bytes"] == "12032"


def test_body_stays_as_it_is_where_the_report_is_switched_off() -> None:
    answer = ask(make_app(lambda: JSONResponse({"usage": {}}), in_body=False))
    assert answer.body == b'{"usage":{}}'
    assert answer.headers["content-length"] == "12"
    assert answer.headers["x-fraqtl-kv-bytes"] == "4352"
    assert answer.headers["x-fraqtl-kv-saved-bytes"] == "12032"


def test_usage_stays_as_it_is_where_that_alone_is_switched_off() -> None:
    usage = {"output_tokens": 3}
    assert ask(make_app(lambda: JSONResponse({"usage": usage}), in_usage=False)).json == {
        "usage": usage,
        "fraqtl": REPORT,
    }
    for path, events in (("/v1/responses", RESPONSES_STREAM), ("/v1/messages", MESSAGES_STREAM)):
        got = ask(make_app(stream_of(events), in_usage=False), path=path).body
        assert b'"fraqtl"' in got and b'"kv_cache"' not in got
    chunk = b'data: {"choices":[],"usage":{"total_tokens":9}}\n\n'
    options = {"stream": True, "stream_options": {"include_usage": True}}
    got = ask(make_app(stream_of([chunk, DONE]), in_usage=False), options).bodies[0]
    assert json.loads(got[6:]) == {"choices": [], "usage": {"total_tokens": 9}, "fraqtl": REPORT}


@pytest.mark.parametrize("body", [b"{ not JSON", b"[1, 2]", b"\xff\xfe\x00", b""])
def test_body_that_is_no_json_object_passes(body: bytes) -> None:
    answer = ask(make_app(lambda: Response(body, media_type="application/json")))
    assert answer.body == body
    assert answer.headers["content-length"] == str(len(body))


def test_nothing_is_said_where_the_engine_said_nothing() -> None:
    app = make_app(lambda: Response(b'{ "usage": {} }', media_type="application/json"))
    app.state.engine.accounts = ()
    answer = ask(app)
    assert answer.body == b'{ "usage": {} }'
    assert answer.headers == {"content-length": "15", "content-type": "application/json"}


@pytest.mark.parametrize(
    "respond",
    [
        lambda: Response(b'{ "error": {"code": 400} }', 400, media_type="application/json"),
        lambda: JSONResponse({"error": {"message": "boom"}}, 500),
        lambda: PlainTextResponse("{} is not JSON here"),
        lambda: Response(b"\x00\xff", media_type="application/octet-stream"),
        lambda: Response(status_code=200),
    ],
)
def test_errors_and_other_bodies_pass(respond: Callable[[], Response]) -> None:
    expected = respond()
    answer = ask(make_app(respond))
    assert (answer.status, answer.body) == (expected.status_code, expected.body)
    assert answer.headers == dict(expected.headers)


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/embeddings", "POST"),
        ("/v1/messages/count_tokens", "POST"),
        ("/v1/models", "GET"),
        (CHAT, "GET"),
    ],
)
def test_other_paths_and_methods_are_untouched(path: str, method: str) -> None:
    answer = ask(make_app(lambda: JSONResponse({"usage": {}})), path=path, method=method)
    assert answer.body == b'{"usage":{}}'
    assert answer.headers == {"content-length": "12", "content-type": "application/json"}


def test_path_under_a_root_path() -> None:
    answer = Answer()
    scope = make_scope("/api" + CHAT, root_path="/api")
    asyncio.run(make_app(lambda: JSONResponse({}))(scope, messages(b"{}"), answer.send))
    assert answer.json == {"fraqtl": REPORT}


def test_before_the_engine_is_up() -> None:
    app = make_app(lambda: JSONResponse({"usage": {}}))
    answer = Answer()
    del app.state.fraqtl_accounting
    asyncio.run(app(make_scope(), messages(b"{}"), answer.send))
    assert answer.body == b'{"usage":{}}'


def test_concurrent_requests_have_their_own_reports() -> None:
    async def handle(request: Request) -> Response:
        number = json.loads(await request.body())["number"]
        engine = FakeEngine(account(list(range(number)), tokens=number))
        request.app.state.fraqtl_accounting.watch(engine)
        outputs = engine.generate("hi", SimpleNamespace(n=1), f"r{number}")
        await asyncio.sleep(0)
        async for _ in outputs:
            pass
        return JSONResponse({})

    app = make_app(lambda: JSONResponse({}))
    app.router.routes = [Route(CHAT, handle, methods=["POST"])]
    answers = [Answer() for _ in range(6)]

    async def run() -> None:
        sent = (app(make_scope(), messages(compact({"number": i})), a.send) for i, a in enumerate(answers))
        await asyncio.gather(*sent)

    asyncio.run(run())
    assert [answer.json["fraqtl"]["tokens"] for answer in answers] == [0, 1, 2, 3, 4, 5]
    assert [answer.headers["x-fraqtl-kv-bytes"] for answer in answers] == [str(2176 * i) for i in range(6)]


# ---- streams


def test_finish_chunk_is_decorated() -> None:
    answer = ask(make_app(stream_of(PLAIN_STREAM)), {"stream": True})
    check_decorated(answer.body, PLAIN_STREAM, where=1)
    assert not [name for name in answer.headers if "fraqtl" in name]  # they went out before the report was known


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_finish_chunk_is_decorated_unless_usage_was_asked_for(options: Any) -> None:
    request = {"stream": True, "stream_options": options, "messages": ['"include_usage": true']}
    check_decorated(ask(make_app(stream_of(PLAIN_STREAM)), request).body, PLAIN_STREAM, where=1)


def test_usage_that_nobody_asked_for_is_not_decorated_too() -> None:
    for pieces in (USAGE_STREAM, [b"".join(USAGE_STREAM)]):
        check_decorated(ask(make_app(stream_of(pieces))).body, USAGE_STREAM, where=1)


def test_usage_chunk_is_decorated() -> None:
    request = {"stream": True, "stream_options": {"include_usage": True}}
    check_decorated(ask(make_app(stream_of(USAGE_STREAM)), request).body, USAGE_STREAM, where=2)


def test_usage_wish_in_a_request_that_comes_in_pieces() -> None:
    whole = compact({"stream": True, "stream_options": {"include_usage": True}})
    answer, app = Answer(), make_app(stream_of(USAGE_STREAM))
    asyncio.run(app(make_scope(), messages(whole[:45], whole[45:]), answer.send))
    check_decorated(answer.body, USAGE_STREAM, where=2)


def test_usage_chunk_that_the_server_forces() -> None:
    app = make_app(stream_of(USAGE_STREAM), enable_force_include_usage=True)
    check_decorated(ask(app, {"stream": True}).body, USAGE_STREAM, where=2)


def test_usage_in_every_chunk() -> None:
    usage = {"usage": {"prompt_tokens": 5, "completion_tokens": 1}}
    events = [sse({**chunk("a"), **usage}), sse({**chunk("b", finish="length"), **usage}), sse(USAGE_CHUNK), DONE]
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = ask(make_app(stream_of(events)), {"stream": True, "stream_options": options})
    check_decorated(answer.body, events, where=2)


def test_last_finish_chunk_of_two_sequences_is_decorated() -> None:
    events = [
        sse(chunk("a", index=1)),
        sse(chunk("b", index=1, finish="stop")),
        sse(chunk("c")),
        sse(chunk("", finish="length")),
        DONE,
    ]
    answer = ask(make_app(stream_of(events)), {"stream": True, "n": 2})
    check_decorated(answer.body, events, where=3, report=REPORT_OF_TWO)


def test_one_chunk_that_ends_two_sequences() -> None:
    both = chunk("a", finish="stop")
    both["choices"] += chunk("b", index=1, finish="stop")["choices"]
    answer = ask(make_app(stream_of([sse(both), DONE])), {"stream": True, "n": 2})
    check_decorated(answer.body, [sse(both), DONE], where=0, report=REPORT_OF_TWO)


def test_words_that_look_like_the_end_are_not_the_end() -> None:
    text = '"finish_reason":"stop" "choices":[] data: {"usage":1}\n\ndata: [DONE]\n\n'
    events = [sse(chunk(text)), sse(chunk("", finish="stop")), DONE]
    check_decorated(ask(make_app(stream_of(events))).body, events, where=1)


@pytest.mark.parametrize(
    "events",
    [
        [sse(chunk("cut off")), DONE],
        [b'data: {"error": {"message":"boom"}}\n\n', DONE],
        [b'data: {"finish_reason":"stop" but not JSON}\n\n', DONE],
        [b": ping\n\n", b"event: message\ndata: {}\n\n", b"data: no end"],
        [],
    ],
)
def test_stream_without_an_end_passes(events: list[bytes]) -> None:
    assert ask(make_app(stream_of(events))).body == b"".join(events)


def test_stream_passes_where_the_engine_said_nothing() -> None:
    app = make_app(stream_of(PLAIN_STREAM))
    app.state.engine.accounts = ()
    assert ask(app).bodies == [*PLAIN_STREAM, b""]


def test_stream_passes_where_the_report_is_switched_off() -> None:
    assert ask(make_app(stream_of(PLAIN_STREAM), in_body=False)).bodies == [*PLAIN_STREAM, b""]


def test_events_cut_at_every_byte() -> None:
    whole = b"".join(USAGE_STREAM)
    app = make_app(stream_of(whole[i : i + 1] for i in range(len(whole))), enable_force_include_usage=True)
    check_decorated(ask(app).body, USAGE_STREAM, where=2)


def test_cut_inside_a_character() -> None:
    whole = b"".join(PLAIN_STREAM)
    middle = whole.index("😀".encode()) + 2
    with pytest.raises(UnicodeDecodeError):
        whole[:middle].decode()
    check_decorated(ask(make_app(stream_of([whole[:middle], whole[middle:]]))).body, PLAIN_STREAM, where=1)


def test_every_event_leaves_in_the_message_that_completes_it() -> None:
    first, second, last = PLAIN_STREAM
    answer = ask(make_app(stream_of([first, second[:20], second[20:] + last[:6], last[6:]])))
    counts = [body.count(b"\n\n") for body in answer.bodies]
    assert answer.bodies[0] == first
    assert counts == [1, 0, 1, 1, 0]
    check_decorated(answer.body, PLAIN_STREAM, where=1)


def test_vllms_own_chunks_are_recognized() -> None:
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponseStreamChoice,
        ChatCompletionStreamResponse,
    )
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    def event(choices: list[Any], usage: Any = None) -> bytes:
        payload = ChatCompletionStreamResponse(model="m", choices=choices, usage=usage)
        return f"data: {payload.model_dump_json(exclude_unset=True)}\n\n".encode()

    def choice(finish: str | None) -> Any:
        return ChatCompletionResponseStreamChoice(index=0, delta=DeltaMessage(content="hi"), finish_reason=finish)

    events = [event([choice(None)]), event([choice("stop")]), event([], UsageInfo(prompt_tokens=3)), DONE]
    check_decorated(ask(make_app(stream_of(events))).body, events, where=1)
    check_decorated(ask(make_app(stream_of(events), enable_force_include_usage=True)).body, events, where=2)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], int | None, int, bool]:
    """Events, the number of the one that must carry the report, how many sequences, whether usage was asked for."""
    n = draw(st.integers(1, 3))
    events = [sse(chunk(text)) for text in draw(st.lists(st.text(max_size=12), max_size=4))]
    ends = [sse(chunk(draw(st.text(max_size=6)), index=i, finish="stop")) for i in draw(st.permutations(range(n)))]
    events += ends[: draw(st.integers(0, n))]
    complete = len(events) > 0 and events[-1] == ends[-1]
    usage = draw(st.booleans())
    if usage and complete:
        events.append(sse(USAGE_CHUNK))
    where = len(events) - 1 if complete else None
    return [*events, DONE], where, n, usage


@given(stream=streams(), data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_cuts_change_nothing(stream: tuple[list[bytes], int | None, int, bool], data: st.DataObject) -> None:
    events, where, n, usage = stream
    whole = b"".join(events)
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12))), len(whole)]
    ledger = Ledger("k4v4", sequences=n, accounts={"a": ACCOUNTS[0]})
    decorator = ChunkDecorator(ledger, usage_chunk=usage)
    sent = received = b""
    for i, (start, end) in enumerate(pairwise(edges)):
        received += whole[start:end]
        sent += decorator.feed(whole[start:end], last=i == len(edges) - 2)
        assert sent.count(b"\n\n") == received.count(b"\n\n")  # nothing complete is held back
    check_decorated(sent, events, where)
    uncut = ChunkDecorator(ledger, usage_chunk=usage).feed(whole, last=True)
    assert sent == uncut


# ---- streams of named events


def named(name: str, payload: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + compact({"type": name, **payload}) + b"\n\n"


USAGE = {"usage": {"input_tokens": 5, "output_tokens": 16}}
RESPONSES_STREAM = [
    named("response.created", {"response": {"id": "resp_1", "usage": None}}),
    named("response.output_text.delta", {"delta": "event: response.completed\ndata: {"}),
    named("response.completed", {"response": {"id": "resp_1", "text": "Grüß", **USAGE}, "sequence_number": 2}),
]
MESSAGES_STREAM = [
    named("message_start", {"message": {"id": "msg_1", **USAGE}}),
    named("content_block_delta", {"delta": {"text": "event: message_delta\ndata: {"}}),
    b"event: ping\ndata: {}\n\n: a comment\n\n",
    named("message_delta", {"delta": {"stop_reason": "end_turn"}, **USAGE}),
    named("message_stop", {}),
]
NAMED_STREAMS = [
    pytest.param("/v1/responses", RESPONSES_STREAM, 2, id="responses"),
    pytest.param("/v1/messages", MESSAGES_STREAM, 3, id="messages"),
]


def check_named(out: bytes, events: list[bytes], where: int) -> None:
    """`out` is `events`, byte for byte, but for the report beside the usage of event number `where`."""
    before, after = b"".join(events[:where]), b"".join(events[where + 1 :])
    assert out.startswith(before) and out.endswith(after)
    got = out[len(before) : len(out) - len(after)]
    name, _, data = events[where].partition(b"data: ")
    assert got.startswith(name + b"data: ") and got.endswith(b"\n\n")
    expected = json.loads(data)
    inside = expected.get("response", expected)
    inside |= {"fraqtl": REPORT, "usage": {**inside["usage"], "kv_cache": COUNTS}}
    assert json.loads(got[len(name) + len(b"data: ") :]) == expected


@pytest.mark.parametrize(("path", "events", "where"), NAMED_STREAMS)
def test_named_event_with_the_usage_is_decorated(path: str, events: list[bytes], where: int) -> None:
    check_named(ask(make_app(stream_of(events)), {"stream": True}, path=path).body, events, where)


@pytest.mark.parametrize(("path", "events", "where"), NAMED_STREAMS)
def test_named_events_cut_at_every_byte(path: str, events: list[bytes], where: int) -> None:
    whole = b"".join(events)
    pieces = [whole[i : i + 1] for i in range(len(whole))]
    check_named(ask(make_app(stream_of(pieces)), path=path).body, events, where)


@pytest.mark.parametrize(("path", "events", "where"), NAMED_STREAMS)
def test_named_events_pass_where_there_is_nothing_to_say(path: str, events: list[bytes], where: int) -> None:
    silent = make_app(stream_of(events))
    silent.state.engine.accounts = ()
    whole = b"".join(events)
    assert ask(silent, path=path).body == whole
    assert ask(make_app(stream_of(events), in_body=False), path=path).body == whole
    cut = [*events[:where], events[where].replace(b'"usage":{"input_tokens":5,"output_tokens":16}', b'"usage":null')]
    assert ask(make_app(stream_of(cut)), path=path).body == b"".join(cut)


@pytest.mark.parametrize(("path", "name"), [("/v1/responses", "response.completed"), ("/v1/messages", "message_delta")])
@pytest.mark.parametrize("data", [b"not JSON", b"{broken", b"[1]", b'{"response":3}', b"{}"])
def test_named_event_that_is_not_as_expected_passes(path: str, name: str, data: bytes) -> None:
    event = b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
    assert ask(make_app(stream_of([event])), path=path).body == event


# ---- ends nobody wished for


def broken(pieces: list[bytes], then: BaseException | None, seen: list[int], app: Starlette) -> Response:
    """A stream that notes how many ledgers are open, and ends with an exception or not at all."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            seen.append(len(app.state.fraqtl_accounting.still_open))
            yield piece
        if then is not None:
            raise then
        await never()

    return StreamingResponse(body(), media_type="text/event-stream")


def test_ledger_is_closed_when_the_client_hangs_up_between_messages() -> None:
    seen: list[int] = []
    app = make_app(lambda: broken(PLAIN_STREAM[:1], None, seen, app))
    answer = Answer()
    gone = asyncio.Event()
    body = [{"type": "http.request", "body": b"{}"}]

    async def receive() -> Any:
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await answer.send(message)
        if answer.bodies:
            gone.set()

    asyncio.run(app(make_scope(asgi={"spec_version": "2.3"}), receive, send))
    assert (seen, answer.bodies) == ([1], PLAIN_STREAM[:1])
    assert app.state.fraqtl_accounting.still_open == []


def test_ledger_is_closed_when_sending_fails() -> None:
    seen: list[int] = []
    app = make_app(lambda: broken(PLAIN_STREAM[:2], None, seen, app))
    answer = Answer()

    async def send(message: Any) -> None:
        if len(answer.bodies) == 1:
            raise OSError("connection lost")
        await answer.send(message)

    with pytest.raises(ClientDisconnect):
        asyncio.run(app(make_scope(), messages(b"{}"), send))
    assert seen == [1, 1]
    assert app.state.fraqtl_accounting.still_open == []


def test_ledger_is_closed_when_the_stream_breaks() -> None:
    seen: list[int] = []
    app = make_app(lambda: broken(PLAIN_STREAM[:1], RuntimeError("engine died"), seen, app))
    answer = Answer()
    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(app(make_scope(), messages(b"{}"), answer.send))
    assert (seen, answer.bodies) == ([1], PLAIN_STREAM[:1])
    assert app.state.fraqtl_accounting.still_open == []


def test_ledger_is_closed_when_the_application_raises() -> None:
    def respond() -> Response:
        assert len(app.state.fraqtl_accounting.still_open) == 1
        raise RuntimeError("engine died")

    app = make_app(respond)
    answer = Answer()
    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(app(make_scope(), messages(b"{}"), answer.send))
    assert (answer.status, answer.body) == (500, b"Internal Server Error")
    assert app.state.fraqtl_accounting.still_open == []
