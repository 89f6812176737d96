"""What the engine's process does for accounts, beside scheduling.

An account leaves the engine only for an API server that asked for accounts: one that takes them out of what it
sends to clients again. vLLM's other front ends (`vllm serve` without our plugin, the Rust server, gRPC, `LLM`) never
ask, and so never see one. The question is a call of the engine by name, as vLLM's own utility calls are.

Where vLLM ends sequences by itself (a pause, a stop), it answers their clients at once. The account must not come
later than that, so it leaves just before, and doesn't wait for the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fraqtl_vllm import hooks
from fraqtl_vllm._vllm import EngineCoreOutputs

ASK = hooks.ASK.attribute  # to be called with the number of the client that asks


def install(engine: type[Any]) -> None:
    """Give `engine`, vLLM's EngineCoreProc, the method `ASK`, and have it send accounts as soon as there are any."""
    hooks.ASK.put(engine, _send_accounts)
    hooks.ABORTS.wrap(engine, _then_accounts)
    hooks.ENDS.wrap(engine, _accounts_first)


def _send_accounts(self: Any, client_index: int) -> None:
    self.scheduler.send_accounts_to(client_index)


def _then_accounts(abort_requests: Callable[..., None]) -> Callable[..., None]:
    def watched(self: Any, request_ids: list[str]) -> None:
        abort_requests(self, request_ids)
        _send_last_accounts(self)

    return watched


def _accounts_first(send_finish: Callable[..., None]) -> Callable[..., None]:
    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        _send_last_accounts(self)
        send_finish(self, *args, **kwargs)

    return watched


def _send_last_accounts(engine: Any) -> None:
    take = getattr(engine.scheduler, "take_last_accounts", None)  # another engine of the process may have a stock one
    for client_index, outputs in (take() if take else {}).items():
        engine.output_queue.put_nowait((client_index, EngineCoreOutputs(outputs=outputs)))
