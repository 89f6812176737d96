"""What the engine's process does for accounts, beside scheduling.

An account leaves the engine only for an API server that asked for accounts: one that takes them out of what it
sends to clients again. vLLM's other front ends (`vllm serve` without our plugin, the Rust server, gRPC, `LLM`) never
ask, and so never see one. The question is a call of the engine by name, as vLLM's own utility calls are.

Where vLLM ends sequences by itself (a pause, a stop), it answers their clients at once. The account must not come
later than that, so it leaves just before, and doesn't wait for the next step.
"""

from __future__ import annotations

from typing import Any

from fraqtl_vllm._vllm import EngineCoreOutputs

ASK = "fraqtl_send_accounts"  # to be called with the number of the client that asks


def install(engine: type[Any]) -> None:
    """Give `engine`, vLLM's EngineCoreProc, the method `ASK`, and have it send accounts as soon as there are any."""
    if hasattr(engine, ASK):
        return
    abort_requests, send_finish = engine.abort_requests, engine._send_finish_outputs_to_client

    def send_accounts(self: Any, client_index: int) -> None:
        self.scheduler.send_accounts_to(client_index)

    def watched_abort_requests(self: Any, request_ids: list[str]) -> None:
        abort_requests(self, request_ids)
        _send_last_accounts(self)

    def watched_send_finish(self: Any, *args: Any, **kwargs: Any) -> None:
        _send_last_accounts(self)
        send_finish(self, *args, **kwargs)

    setattr(engine, ASK, send_accounts)
    engine.abort_requests, engine._send_finish_outputs_to_client = watched_abort_requests, watched_send_finish


def _send_last_accounts(engine: Any) -> None:
    take = getattr(engine.scheduler, "take_last_accounts", None)  # another engine of the process may have a stock one
    for client_index, outputs in (take() if take else {}).items():
        engine.output_queue.put_nowait((client_index, EngineCoreOutputs(outputs=outputs)))
