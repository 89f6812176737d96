"""Answers of sequences that this process aborts wait for the engine's account of them.

Where a route or a handler aborts a sequence whose client still listens (`/abort_requests`, for one), vLLM ends its
answer at once, and only then tells the engine. The end of the answer is held here until the engine has said what the
sequence held, which takes it one message; an engine that has died says nothing, and holds nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fraqtl_serve.engine import hooks


class _Slot:
    """In the place of the queue of a sequence that is being aborted."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.outputs: list[Any] = []

    def put(self, output: Any) -> None:
        self.outputs.append(output)


class HeldAnswers:
    def __init__(self, processor: Any, is_awaited: Callable[[str], bool]) -> None:
        """Watch `processor`, vLLM's OutputProcessor.

        is_awaited: whether the engine will still say something of a sequence, by its own id, and an answer wants it.
        """
        self._processor = processor
        self._is_awaited = is_awaited
        self._slots: dict[str, _Slot] = {}
        self._engine_is_gone = False
        hooks.ABORTS.wrap(processor, self._aborts_watched)
        hooks.ERRORS_RELEASE.wrap(processor, self._errors_watched)

    def _aborts_watched(self, abort_requests: Callable[..., Any]) -> Callable[..., Any]:
        def watched(request_ids: Iterable[str], internal: bool) -> Any:
            request_ids = list(request_ids)
            for key in self._sequences_of(request_ids, internal):
                self._hold(key)
            return abort_requests(request_ids, internal)

        return watched

    def _errors_watched(self, propagate_error: Callable[[Exception], None]) -> Callable[[Exception], None]:
        def watched(error: Exception) -> None:
            self._engine_is_gone = True
            for key in list(self._slots):
                self.release(key)
            propagate_error(error)

        return watched

    def release(self, key: str) -> None:
        """Let the answer of this sequence go, if it is held."""
        slot = self._slots.pop(key, None)
        for output in slot.outputs if slot is not None else ():
            slot.queue.put(output)  # type: ignore[union-attr]

    def _sequences_of(self, request_ids: list[str], internal: bool) -> list[str]:
        """The engine's ids of what is to be aborted; vLLM calls again for the sequences of a parent."""
        if internal:
            return request_ids
        return [key for request_id in request_ids for key in self._processor.external_req_ids.get(request_id, ())]

    def _hold(self, key: str) -> None:
        state = self._processor.request_states.get(key)
        if state is None or state.queue is None or key in self._slots:
            return
        if self._is_awaited(key) and not self._engine_is_gone:
            self._slots[key] = state.queue = _Slot(state.queue)
