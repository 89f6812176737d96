"""What a server that was told to stop says to requests that its engine turns away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState

from fraqtl_serve.http import shutdown
from tests.serve.fake_engine import FakeDetokenizer, FakeEngine


class Loop(asyncio.SelectorEventLoop):
    """Keeps what it is asked to call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def call_soon_threadsafe(self, callback: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((callback, *args))


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class StoppableEngine(FakeEngine):
    def __init__(self) -> None:
        super().__init__()
        self.stopped_with: Any = None

    def shutdown(self, timeout: float | None = None) -> str:
        self.stopped_with = timeout
        return "stopped"


@pytest.fixture
def engine() -> StoppableEngine:
    return StoppableEngine()


def admit(engine: StoppableEngine, key: str, *, has_spoken: bool) -> RequestOutputCollector:
    queue = RequestOutputCollector(RequestOutputKind.DELTA, key)
    engine.output_processor.request_states[key] = SimpleNamespace(
        queue=queue, is_prefilling=not has_spoken, detokenizer=FakeDetokenizer()
    )
    return queue


def end(engine: StoppableEngine, key: str, reason: FinishReason = FinishReason.ABORT) -> str:
    return engine.output_processor.process_outputs([EngineCoreOutput(key, [], finish_reason=reason)], 7.0)


def test_request_that_is_turned_away_fails_with_503(engine: StoppableEngine, loop: Loop) -> None:
    stop = shutdown.watch(engine, loop)
    queue = admit(engine, "a", has_spoken=False)
    assert engine.shutdown(timeout=6) == "stopped"  # type: ignore[comparison-overlap]
    assert (stop.requested, engine.stopped_with) == (True, 6)
    assert end(engine, "a") == "processed 1 at 7.0"
    with pytest.raises(GracefulHTTPError, match="shutting down") as caught:
        asyncio.run(queue.get())
    assert caught.value.http_status == 503


@pytest.mark.parametrize(
    ("stops", "has_spoken", "reason"),
    [(False, False, FinishReason.ABORT), (True, True, FinishReason.ABORT), (True, False, FinishReason.LENGTH)],
    ids=["while it runs (a pause, say)", "has an answer to keep", "came to its own end"],
)
def test_other_ends_are_left_alone(
    engine: StoppableEngine, loop: Loop, stops: bool, has_spoken: bool, reason: FinishReason
) -> None:
    shutdown.watch(engine, loop)
    queue = admit(engine, "a", has_spoken=has_spoken)
    if stops:
        engine.shutdown()
    end(engine, "a", reason)
    end(engine, "nobody knows it")
    assert queue.get_nowait() is None


@pytest.mark.parametrize("stops", [False, True])
def test_a_dead_engine_is_a_breakdown_unless_the_server_was_told_to_stop(
    engine: StoppableEngine, loop: Loop, stops: bool
) -> None:
    shutdown.watch(engine, loop)
    if stops:
        engine.shutdown()
    engine.output_processor.propagate_error(EngineDeadError())
    engine.engine_core.broken = EngineDeadError()
    with pytest.raises(Exception) as sent:
        asyncio.run(engine.engine_core.add_request_async(SimpleNamespace(request_id="a")))
    wanted = GracefulHTTPError if stops else EngineDeadError
    assert [type(error) for error in (*engine.output_processor.propagated, sent.value)] == [wanted] * 2


def test_who_still_waits_when_the_engine_has_stopped_is_told(engine: StoppableEngine, loop: Loop) -> None:
    shutdown.watch(engine, loop)
    engine.shutdown()
    [(call, error)] = loop.calls
    call(error)
    assert engine.output_processor.propagated == [error]
    assert isinstance(error, GracefulHTTPError)


def test_stopped_once_more_when_the_loop_has_ended(engine: StoppableEngine) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    shutdown.watch(engine, loop)
    engine.shutdown()
    assert engine.output_processor.propagated == []


def test_vllm_has_what_is_looked_at() -> None:
    names = RequestState.__init__.__code__.co_names
    assert {"queue", "is_prefilling"} <= set(names)
    assert callable(OutputProcessor.propagate_error)


def test_new_work_is_refused_and_questions_are_answered() -> None:
    app = Starlette(routes=[Route("/v1/completions", lambda _: PlainTextResponse("yes"), methods=["GET", "POST"])])
    app.add_middleware(shutdown.Shutdown)
    client = TestClient(app)
    assert client.post("/v1/completions").text == "yes"  # the engine is not up yet
    app.state.fraqtl_stop = stop = shutdown.Stop()
    assert client.post("/v1/completions").text == "yes"
    stop.requested = True
    refused = client.post("/v1/completions")
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    assert "shutting down" in refused.json()["error"]["message"]
    assert client.get("/v1/completions").text == "yes"


def test_work_that_finds_the_server_half_gone_is_refused() -> None:
    """It came before the stop; only an answer that has begun, or a fault without a stop, is what it is."""
    stop = shutdown.Stop()

    def breaks(request: object) -> PlainTextResponse:
        stop.requested = breaks_late
        raise RuntimeError("cannot schedule new futures after shutdown")

    app = Starlette(routes=[Route("/v1/completions", breaks, methods=["POST"])])
    app.add_middleware(shutdown.Shutdown)
    app.state.fraqtl_stop = stop
    client = TestClient(app, raise_server_exceptions=False)
    breaks_late = False
    assert client.post("/v1/completions").status_code == 500
    breaks_late = True
    refused = client.post("/v1/completions")
    assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
