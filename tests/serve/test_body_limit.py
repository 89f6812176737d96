from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fraqtl_serve.http.body_limit import BodyLimit
from tests.serve.small_app import CHAT, Answer, make_scope, messages


def ask(*pieces: bytes, said: bytes | None = None, handle: Callable[[Request], Any] | None = None) -> Answer:
    async def length(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route(CHAT, handle or length, methods=["POST"])])
    app.add_middleware(BodyLimit, limit=10)
    answer = Answer()
    headers = [] if said is None else [(b"content-length", said)]
    asyncio.run(app(make_scope(headers=headers), messages(*pieces), answer.send))
    return answer


@pytest.mark.parametrize("pieces", [(b"x" * 10,), (b"x" * 5, b"y" * 5), (b"",), (b"x" * 10, b"")])
@pytest.mark.parametrize("said", [None, b"10", b"nonsense"])
def test_bodies_within_the_limit(pieces: tuple[bytes, ...], said: bytes | None) -> None:
    answer = ask(*pieces, said=said)
    assert (answer.status, answer.body) == (200, str(sum(map(len, pieces))).encode())


def check_refused(answer: Answer) -> None:
    assert answer.status == 413
    assert answer.json["error"]["message"] == "a request's body may have 10 bytes (--max-body-bytes), this has more"
    assert answer.headers["content-length"] == str(len(answer.body))


def test_length_that_is_said_is_refused_unread() -> None:
    async def never_asked(request: Request) -> Response:
        raise AssertionError

    check_refused(ask(b"x", said=b"11", handle=never_asked))


@pytest.mark.parametrize("pieces", [(b"x" * 11,), (b"x" * 9, b"y", b"z"), (b"x" * 5, b"y" * 100, b"z" * 100)])
@pytest.mark.parametrize("said", [None, b"3"])
def test_length_that_is_found(pieces: tuple[bytes, ...], said: bytes | None) -> None:
    with pytest.raises(ClientDisconnect):  # Starlette's handler ends; FastAPI's answers 400, which is dropped
        check_refused(ask(*pieces, said=said))

    async def answers_anyway(request: Request) -> Response:
        try:
            await request.body()
        except ClientDisconnect:
            return PlainTextResponse("gone", 400)
        raise AssertionError

    check_refused(ask(*pieces, said=said, handle=answers_anyway))


def test_body_after_the_answer_is_not_refused_twice() -> None:
    async def answers_early(request: Request) -> Response:
        return PlainTextResponse("early")

    assert ask(b"x" * 11, handle=answers_early).body == b"early"
