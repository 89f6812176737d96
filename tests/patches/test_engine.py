"""The engine's process: who gets accounts, and when."""

from __future__ import annotations

import inspect
import queue
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from fraqtl_vllm.accounting.engine import ASK, install


class Scheduler:
    """In the place of ours: every aborted request leaves an account."""

    def __init__(self) -> None:
        self.clients: list[int] = []
        self.left: dict[int, list[EngineCoreOutput]] = {}

    def send_accounts_to(self, client_index: int) -> None:
        self.clients.append(client_index)

    def take_last_accounts(self) -> dict[int, list[EngineCoreOutput]]:
        left, self.left = self.left, {}
        return left


def make_engine(scheduler: Any) -> Any:
    class Engine:
        """What of vLLM's EngineCoreProc is watched."""

        def __init__(self) -> None:
            self.scheduler = scheduler
            self.output_queue: queue.Queue[Any] = queue.Queue()

        def abort_requests(self, request_ids: list[str]) -> None:
            if isinstance(scheduler, Scheduler):
                scheduler.left = {3: [EngineCoreOutput(key, []) for key in request_ids]}

        def _send_finish_outputs_to_client(self, req_ids: list[str], client_index: int, finish_reason: Any) -> None:
            ends = [EngineCoreOutput(key, [], finish_reason=finish_reason) for key in req_ids]
            self.output_queue.put_nowait((client_index, EngineCoreOutputs(outputs=ends)))

    install(Engine)
    install(Engine)  # another engine of the process
    return Engine()


def sent(engine: Any) -> list[tuple[int, str, FinishReason | None]]:
    found = []
    while not engine.output_queue.empty():
        client, outputs = engine.output_queue.get()
        found += [(client, output.request_id, output.finish_reason) for output in outputs.outputs]
    return found


def test_a_client_asks() -> None:
    scheduler = Scheduler()
    getattr(make_engine(scheduler), ASK)(2)
    assert scheduler.clients == [2]


def test_account_of_an_abort_is_sent_at_once_and_once() -> None:
    engine = make_engine(Scheduler())
    engine.abort_requests(["a", "b"])
    assert sent(engine) == [(3, "a", None), (3, "b", None)]
    engine._send_finish_outputs_to_client(["c"], 3, FinishReason.ABORT)
    assert sent(engine) == [(3, "c", FinishReason.ABORT)]


def test_account_comes_before_the_end_that_the_engine_sends() -> None:
    scheduler = Scheduler()
    engine = make_engine(scheduler)
    scheduler.left = {3: [EngineCoreOutput("a", [])]}
    engine._send_finish_outputs_to_client(["a"], 3, FinishReason.ABORT)
    assert sent(engine) == [(3, "a", None), (3, "a", FinishReason.ABORT)]


def test_stock_scheduler_in_the_same_process() -> None:
    engine = make_engine(SimpleNamespace())
    engine.abort_requests(["a"])
    engine._send_finish_outputs_to_client(["a"], 0, FinishReason.ABORT)
    assert sent(engine) == [(0, "a", FinishReason.ABORT)]


def test_vllm_has_what_is_watched() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    assert list(inspect.signature(EngineCoreProc.abort_requests).parameters)[:2] == ["self", "request_ids"]
    for ends in (EngineCoreProc._send_abort_outputs_to_client, EngineCoreProc._send_error_outputs_to_client):
        assert "_send_finish_outputs_to_client" in ends.__code__.co_names
    assert "_send_abort_outputs" in EngineCoreProc.pause_scheduler.__code__.co_names
    assert "_send_abort_outputs" in EngineCoreProc._handle_shutdown.__code__.co_names
