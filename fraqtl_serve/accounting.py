"""Carries the engine's accounts from the API server's engine client to the HTTP request they belong to.

The engine attaches an account to the last output of a sequence (`fraqtl_vllm.scheduler`). Two
methods of the engine client are wrapped, both without touching what they return: `generate`,
which is called in the context of an HTTP request and so tells which sequences it owns, and
`output_processor.process_outputs`, which sees the outputs of all of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

from fraqtl_serve.report import Ledger
from fraqtl_vllm.scheduler import ACCOUNT_KEY

current_ledger: ContextVar[Ledger | None] = ContextVar("fraqtl_ledger", default=None)


class Accounting:
    """The open ledgers of one API server process, by the request id that vLLM's handlers chose."""

    def __init__(self, kv_format: str) -> None:
        self.kv_format = kv_format
        self._open: dict[str, Ledger] = {}

    def open(self) -> Ledger:
        """Start a ledger for the HTTP request of the current context."""
        ledger = Ledger(self.kv_format)
        current_ledger.set(ledger)
        return ledger

    def close(self, ledger: Ledger) -> None:
        ledger.closed = True
        self._open = {key: other for key, other in self._open.items() if other is not ledger}

    def watch(self, engine_client: Any) -> None:
        """Wrap the two methods of an engine client."""
        generate = engine_client.generate
        processor = engine_client.output_processor
        process_outputs = processor.process_outputs

        def watched_generate(
            prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[Any, None]:
            ledger = current_ledger.get()
            if ledger is not None and not ledger.closed:  # tasks can outlive the request they inherit it from
                ledger.sequences += sampling_params.n
                self._open[request_id] = ledger
            return generate(prompt, sampling_params, request_id, *args, **kwargs)

        def watched_process_outputs(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            for output in engine_core_outputs:
                self._take(output, processor.request_states.get(output.request_id))
            return process_outputs(engine_core_outputs, *args, **kwargs)

        engine_client.generate = watched_generate
        processor.process_outputs = watched_process_outputs

    def _take(self, output: Any, state: Any) -> None:
        """Move the account out of an engine output into the ledger it belongs to, if it is still open."""
        account = (output.kv_transfer_params or {}).pop(ACCOUNT_KEY, None)
        if account is None and output.prefill_stats is None:
            return
        output.kv_transfer_params = output.kv_transfer_params or None
        ledger = self._open.get((state.parent_req or state).external_req_id) if state is not None else None
        if ledger is None:
            return
        if output.prefill_stats is not None:
            ledger.cached_tokens[output.request_id] = output.prefill_stats.num_cached_tokens
        if account is not None:
            ledger.accounts[output.request_id] = account
