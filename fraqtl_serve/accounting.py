"""Carries the engine's accounts from the API server's engine client to the HTTP request they belong to.

The engine attaches an account to the last output of a sequence (`fraqtl_vllm.scheduler`). Four
methods of the engine client are wrapped, all without touching what they return: `generate`,
which is called in the context of an HTTP request and so tells which prompts it owns;
`output_processor.add_request`, which tells the engine's ids of their sequences;
`engine_core.add_request_async`, which tells if the engine was not given one after all; and
`output_processor.process_outputs`, which sees the outputs of all of them.

The account of an aborted sequence comes when its HTTP request is over. It can be in no response
any more, but it is counted: a ledger is settled when every sequence has ended in the engine.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any

from fraqtl_serve._vllm import FinishReason, VLLMValidationError
from fraqtl_serve.report import KVReport, Ledger
from fraqtl_vllm.scheduler import ACCOUNT_KEY

# vLLM's beam search runs every beam one token further as a request of its own, in rounds that it names so.
BEAM = re.compile(r"(?P<prompt>.+)-(?P<round>[0-9a-f]{16})-beam-\d+")

current_ledger: ContextVar[Ledger | None] = ContextVar("fraqtl_ledger", default=None)


class Accounting:
    """The open ledgers of one API server process, by the request id that vLLM's handlers chose."""

    def __init__(self, kv_format: str, on_settled: Callable[[Ledger], None] = lambda ledger: None) -> None:
        self.kv_format = kv_format
        self._on_settled = on_settled  # called once for every ledger that the engine was given work for
        self._open: dict[str, Ledger] = {}
        self._sequences: dict[str, Ledger] = {}  # by the engine's ids, until the engine says that they ended

    def open(self, endpoint: str = "") -> Ledger:
        """Start a ledger for the HTTP request of the current context."""
        ledger = Ledger(self.kv_format, endpoint=endpoint)
        current_ledger.set(ledger)
        return ledger

    def close(self, ledger: Ledger) -> None:
        if ledger.closed:
            return
        ledger.closed = True
        self._open = {key: other for key, other in self._open.items() if other is not ledger}
        self._settle(ledger)

    def _settle(self, ledger: Ledger) -> None:
        if ledger.started and ledger.is_settled:
            self._on_settled(ledger)

    def watch(self, engine_client: Any) -> None:
        """Wrap the four methods of an engine client."""
        generate = engine_client.generate
        engine, processor = engine_client.engine_core, engine_client.output_processor
        send = engine.add_request_async
        add_request = processor.add_request
        process_outputs = processor.process_outputs

        def watched_generate(
            prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[Any, None]:
            ledger = current_ledger.get()
            if ledger is not None and not ledger.closed:  # tasks can outlive the request they inherit it from
                beam = BEAM.fullmatch(request_id)
                if beam:
                    self._next_round(ledger, beam["prompt"], beam["round"])
                ledger.sequences += sampling_params.n
                ledger.request_id = ledger.request_id or (beam["prompt"] if beam else request_id)
                self._open[request_id] = ledger
            return generate(prompt, sampling_params, request_id, *args, **kwargs)

        def watched_add_request(
            request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
        ) -> Any:
            ledger = self._open.get((parent_req or request).external_req_id)
            if ledger is not None:
                ledger.started.add(request.request_id)
                self._sequences[request.request_id] = ledger
            return add_request(request, prompt, parent_req, request_index, queue)

        async def watched_send(request: Any) -> None:
            try:
                await send(request)
            except BaseException as error:  # it will say nothing of this sequence
                self._forget(request.request_id)
                processor.abort_requests([request.request_id], internal=True)  # which vLLM forgets where n is 1
                if isinstance(error, OverflowError):  # an integer beyond what the message may hold
                    raise VLLMValidationError(f"a field's value can't be used: {error}") from error
                raise

        def watched_process_outputs(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            states = processor.request_states
            said = [output for output in engine_core_outputs if _matters(output) and self._says_something(output)]
            if not said:  # as for most tokens
                return process_outputs(engine_core_outputs, *args, **kwargs)
            alive = {output.request_id for output in said if output.request_id in states}
            result = process_outputs(engine_core_outputs, *args, **kwargs)
            for output in said:
                # vLLM forgets a sequence when it is finished here, or before, when it was aborted.
                ended = output.request_id in alive and output.request_id not in states
                finished = ended and not _has_failed(output)
                if ended or _is_last(output):
                    self._end(output.request_id, finished=finished)
            return result

        engine_client.generate = watched_generate
        processor.add_request = watched_add_request
        engine.add_request_async = watched_send
        processor.process_outputs = watched_process_outputs

    def report_of(self, key: str) -> KVReport | None:
        """The report over one sequence that has not been counted as ended yet, by the engine's id."""
        ledger = self._sequences.get(key)
        return None if ledger is None else ledger.report_of([key])

    def _next_round(self, ledger: Ledger, prompt: str, number: str) -> None:
        """Beams are counted as they are in their last round; the rounds before were the same sequences, shorter."""
        if ledger.rounds.get(prompt) == number:
            return
        ledger.rounds[prompt] = number
        before = {key for key in ledger.accounts if (beam := BEAM.match(key)) and beam["prompt"] == prompt}
        ledger.sequences -= len(before)
        for key in before:
            del ledger.accounts[key]

    def _forget(self, key: str) -> None:
        """A sequence that the engine was not given: nothing to wait for."""
        ledger = self._sequences.pop(key, None)
        if ledger is not None:
            ledger.started.discard(key)
            self._settle(ledger)

    def _says_something(self, output: Any) -> bool:
        return self._take(output) or _has_failed(output)

    def _take(self, output: Any) -> bool:
        """Move the account out of an engine output into the ledger it belongs to; says if there was one."""
        account = (output.kv_transfer_params or {}).pop(ACCOUNT_KEY, None)
        if account is None:
            return False
        output.kv_transfer_params = output.kv_transfer_params or None
        ledger = self._sequences.get(output.request_id)
        if ledger is None:
            return False
        # While a sequence runs, an account leaves out what has not changed since the last one.
        ledger.accounts[output.request_id] = {**ledger.accounts.get(output.request_id, {}), **account}
        return True

    def _end(self, key: str, *, finished: bool) -> None:
        ledger = self._sequences.pop(key, None)
        if ledger is None:  # its end was already seen
            return
        ledger.ended.add(key)
        if finished:
            ledger.finished.add(key)
        self._settle(ledger)


def _matters(output: Any) -> bool:
    """Whether an output may carry an account or end a sequence: a look at two fields, for it comes with every token."""
    return output.kv_transfer_params is not None or output.finish_reason is not None


def _is_last(output: Any) -> bool:
    """Whether the engine will say no more of this sequence: it finished, or is the account of an aborted one."""
    return output.finished or not output.new_token_ids


def _has_failed(output: Any) -> bool:
    """Whether the engine could not run this sequence: then it gives no account of it."""
    return output.finish_reason is FinishReason.ERROR
