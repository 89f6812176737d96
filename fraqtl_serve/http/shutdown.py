"""A stop that ends, and that tells clients the truth.

When vLLM's server is told to stop while it generates, it stops the engine and then waits for open connections; a
request that the dead engine will never answer can keep it waiting for ever. uvicorn has a limit for that wait,
which vLLM leaves unset.

Until then it still listens. Its engine turns new requests away by ending them at once, which gives the client 200
and an answer without a token; and what was cut off when the engine is gone gets 500, as if it had broken down. Here
both get 503, which load balancers and client libraries send elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

from fraqtl_serve._vllm import EngineDeadError, FinishReason, GracefulHTTPError
from fraqtl_serve.engine import hooks
from fraqtl_serve.http.asgi import Application, Message, Receive, Scope, Send
from fraqtl_serve.http.errors import send_error

CONNECTION_SECONDS = 3  # the engine has stopped by then: nothing more can come
SAID = "this server is shutting down: send the request to another one, or again when it is back"


@dataclass
class Stop:
    """Whether this API server process was told to stop."""

    requested: bool = False


def watch(engine_client: Any, loop: asyncio.AbstractEventLoop) -> Stop:
    """Notice that `engine_client` is told to stop, and have the requests fail with 503 that it does not serve then.

    A request that its engine ends after some tokens keeps them, with vLLM's finish reason `abort`.
    loop: the event loop of the handlers; vLLM stops its engine in another thread.
    """
    stop = Stop()
    engine, processor = engine_client.engine_core, engine_client.output_processor
    hooks.STOP.wrap(engine_client, partial(_shutdown_watched, stop, loop, processor.propagate_error))
    hooks.STOP_SEND.wrap(engine, partial(_send_watched, stop))
    hooks.STOP_OUTPUTS.wrap(processor, partial(_outputs_watched, stop, processor))
    hooks.STOP_ERRORS.wrap(processor, partial(_errors_watched, stop))
    return stop


def _shutdown_watched(
    stop: Stop, loop: asyncio.AbstractEventLoop, propagate_error: Callable[..., None], shutdown: Callable[..., Any]
) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        stop.requested = True
        try:
            return shutdown(*args, **kwargs)
        finally:  # vLLM has ended the task that would tell those who still wait
            with suppress(RuntimeError):  # the loop has ended: there is nobody
                loop.call_soon_threadsafe(propagate_error, _refusal())

    return watched


def _outputs_watched(stop: Stop, processor: Any, process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    def watched(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        queues = [_queue_of_unserved(processor, out) for out in engine_core_outputs] if stop.requested else []
        result = process_outputs(engine_core_outputs, *args, **kwargs)
        for queue in queues:
            if queue is not None:
                queue.put(_refusal())
        return result

    return watched


def _errors_watched(stop: Stop, propagate_error: Callable[..., None]) -> Callable[..., None]:
    def watched(error: Exception) -> None:
        propagate_error(_refusal() if stop.requested else error)  # to all requests: the engine is gone

    return watched


def _send_watched(stop: Stop, send: Callable[..., Any]) -> Callable[..., Any]:
    async def watched(request: Any) -> None:
        try:
            await send(request)
        except EngineDeadError:
            if stop.requested:
                raise _refusal() from None
            raise

    return watched


def _refusal() -> GracefulHTTPError:
    return GracefulHTTPError(SAID, HTTPStatus.SERVICE_UNAVAILABLE)


def _queue_of_unserved(processor: Any, output: Any) -> Any | None:
    """The queue of a request that ends with `output` without a single token; None if it isn't such a request."""
    if output.finish_reason is not FinishReason.ABORT or output.new_token_ids:
        return None
    state = processor.request_states.get(output.request_id)
    return state.queue if state is not None and state.is_prefilling else None


class Shutdown:
    """ASGI middleware: sets uvicorn's limit when the application starts, unless it is set; 503 while it stops.

    Only a POST gives the engine work; probes, metrics and our own routes answer to the end. One that came just before
    the stop may find a part of the server gone and break down over it: that is 503, too.
    """

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            server = getattr(scope["app"].state, "server", None)
            if server is not None and server.config.timeout_graceful_shutdown is None:
                hooks.CONNECTIONS.put(server.config, CONNECTION_SECONDS)
        elif scope["type"] == "http" and scope["method"] == "POST":
            stop: Stop | None = getattr(scope["app"].state, "fraqtl_stop", None)
            if stop is not None:
                await self._answer(scope, receive, send, stop)
                return
        await self.app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, stop: Stop) -> None:
        if stop.requested:
            await _refuse(send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception:
            if started or not stop.requested:
                raise
            await _refuse(send)


async def _refuse(send: Send) -> None:
    await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, SAID, headers=[(b"connection", b"close")])
