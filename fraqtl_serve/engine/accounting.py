"""Carries the engine's accounts from the API server's engine client to the HTTP request they belong to.

The engine attaches an account to the last output of a sequence (`fraqtl_vllm.accounting.scheduler`). Four
methods of the engine client are wrapped, all without touching what they return: `generate`,
which tells how many sequences a HTTP request asks for; `output_processor.add_request`, which tells the engine's ids
of them; `engine_core.add_request_async`, which tells if the engine was not given one after all; and
`output_processor.process_outputs`, which sees the outputs of all of them.

The first two run in the context of the HTTP request, whose ledger is in a context variable. No id that a client
can choose has a part in it: the engine's own are unique, and two requests may have one id at the same time.

The account of a sequence whose client has gone comes when its HTTP request is over. It can be in no response
any more, but it is counted: a ledger is settled when every sequence has ended in the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

from fraqtl_serve._vllm import FinishReason, VLLMValidationError
from fraqtl_serve.engine import hooks
from fraqtl_serve.engine.beams import current_search
from fraqtl_serve.engine.held import HeldAnswers
from fraqtl_serve.reports.report import KVReport, Ledger
from fraqtl_vllm.accounting.engine import ASK
from fraqtl_vllm.accounting.schema import ACCOUNT_KEY, Account, Growth, brought_up_to_date

Answers = Callable[..., AsyncGenerator[Any, None]]

current_ledger: ContextVar[Ledger | None] = ContextVar("fraqtl_ledger", default=None)


async def ask_for_accounts(engine_client: Any) -> str | None:
    """Have the engines send this process their accounts; where they can't, returns why."""
    engine = engine_client.engine_core
    try:
        await engine.call_utility_all_async(ASK, engine.client_index)
    except Exception as error:  # vLLM raises no narrower one for what goes wrong in the engine
        return str(error)
    return None


class Accounting:
    """The ledgers of one API server process."""

    def __init__(self, kv_format: str, on_settled: Callable[[Ledger], None] = lambda ledger: None) -> None:
        self.kv_format = kv_format
        self._on_settled = on_settled  # called once for every ledger that the engine was given work for
        self._sequences: dict[str, Ledger] = {}  # by the engine's ids, until the engine says that they ended
        self._several: dict[str, tuple[Any, int]] = {}  # of the outputs that vLLM looks at: see `_several`

    def open(self, endpoint: str = "") -> Ledger:
        """Start a ledger for the HTTP request of the current context."""
        ledger = Ledger(self.kv_format, endpoint=endpoint)
        current_ledger.set(ledger)
        return ledger

    def close(self, ledger: Ledger) -> None:
        if ledger.closed:
            return
        ledger.closed = True
        self._settle(ledger)

    def _settle(self, ledger: Ledger) -> None:
        if ledger.started and ledger.is_settled:
            self._on_settled(ledger)

    def watch(self, engine_client: Any) -> None:
        """Wrap the four methods of an engine client."""
        engine, processor = engine_client.engine_core, engine_client.output_processor
        held = HeldAnswers(processor, self._is_awaited)
        hooks.GENERATE.wrap(engine_client, self._generate_watched)
        hooks.ADD_REQUEST.wrap(processor, self._add_request_watched)
        hooks.SEND.wrap(engine, partial(self._send_watched, processor, held))
        hooks.OUTPUTS.wrap(processor, partial(self._outputs_watched, processor, held))

    def _generate_watched(self, generate: Answers) -> Answers:
        def watched(
            prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
        ) -> AsyncGenerator[Any, None]:
            ledger = _open_ledger()
            if ledger is not None:
                self._expect(ledger, sampling_params.n, request_id)
            return generate(prompt, sampling_params, request_id, *args, **kwargs)

        return watched

    def _add_request_watched(self, add_request: Callable[..., Any]) -> Callable[..., Any]:
        def watched(
            request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
        ) -> Any:
            ledger = _open_ledger()
            if ledger is not None:
                ledger.started.add(request.request_id)
                self._sequences[request.request_id] = ledger
                if (search := current_search.get()) is not None:
                    search.keys.add(request.request_id)
            return add_request(request, prompt, parent_req, request_index, queue)

        return watched

    def _send_watched(self, processor: Any, held: HeldAnswers, send: Callable[..., Any]) -> Callable[..., Any]:
        async def watched(request: Any) -> None:
            try:
                await send(request)
            except BaseException as error:  # it will say nothing of this sequence
                self._forget(request.request_id)
                held.release(request.request_id)
                processor.abort_requests([request.request_id], internal=True)  # which vLLM forgets where n is 1
                if isinstance(error, OverflowError):  # an integer beyond what the message may hold
                    raise VLLMValidationError(f"a field's value can't be used: {error}") from error
                raise

        return watched

    def _outputs_watched(
        self, processor: Any, held: HeldAnswers, process_outputs: Callable[..., Any]
    ) -> Callable[..., Any]:
        def watched(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            states = processor.request_states
            outputs, said = engine_core_outputs, []
            for output in engine_core_outputs:
                if not _matters(output):  # as most tokens
                    continue
                account = _pop_account(output)
                if account is not None and _is_of_an_abort(output):  # which is nothing that a client should see
                    outputs = [other for other in outputs if other is not output]
                if self._keep(output.request_id, account) or _has_failed(output):
                    said.append(output)
            alive = {output.request_id for output in said if output.request_id in states}
            self._several = _several(said, states)
            result = process_outputs(outputs, *args, **kwargs)
            for key in list(self._several):
                self._leave_out(key)
            for output in said:
                # vLLM forgets a sequence when it is finished here, or before, when it was aborted.
                ended = output.request_id in alive and output.request_id not in states
                finished = ended and not _has_failed(output) and not _is_of_an_abort(output)
                if ended or _is_last(output):
                    self._end(output.request_id, finished=finished)
            for output in said:  # an answer may need more than one account of these
                if _is_last(output):
                    held.release(output.request_id)
            return result

        return watched

    def report_of(self, key: str) -> KVReport | None:
        """The report over one sequence that has not been counted as ended yet, by the engine's id."""
        self._leave_out(key)
        ledger = self._sequences.get(key)
        return None if ledger is None else ledger.report_of([key])

    def _expect(self, ledger: Ledger, sequences: int, request_id: str) -> None:
        """Note that `ledger` gets so many sequences more, of the prompt with this id."""
        search = current_search.get()
        if search is not None:
            # Beams are counted as they are in their last round: those before were the same sequences, shorter.
            beams, keys = search.join(request_id)
            ledger.sequences -= beams
            for key in keys:
                ledger.accounts.pop(key, None)
        ledger.sequences += sequences
        ledger.request_id = ledger.request_id or (search.request_id if search else request_id)

    def _is_awaited(self, key: str) -> bool:
        """Whether an answer that is not out yet lacks the engine's last account of this sequence."""
        ledger = self._sequences.get(key)
        return ledger is not None and not ledger.closed

    def _forget(self, key: str) -> None:
        """A sequence that the engine was not given: nothing to wait for."""
        ledger = self._sequences.pop(key, None)
        if ledger is not None:
            ledger.started.discard(key)
            self._settle(ledger)

    def _keep(self, key: str, account: Account | Growth | None) -> bool:
        """Put the account of a sequence into the ledger it belongs to; says if there are both."""
        ledger = self._sequences.get(key)
        if account is None or ledger is None:
            return False
        ledger.accounts[key] = brought_up_to_date(ledger.accounts.get(key), account)
        return True

    def _leave_out(self, key: str) -> None:
        """Tokens of a step that came after a stop string, which vLLM has dropped: the text has none of them."""
        ledger, (detokenizer, count) = self._sequences.get(key), self._several.pop(key, (None, 0))
        if ledger is not None and detokenizer is not None:
            ledger.accounts[key]["tokens"] -= max(0, count - detokenizer.num_output_tokens())

    def _end(self, key: str, *, finished: bool) -> None:
        ledger = self._sequences.pop(key, None)
        if ledger is None:  # its end was already seen
            return
        ledger.ended.add(key)
        if finished:
            ledger.finished.add(key)
        self._settle(ledger)


def _open_ledger() -> Ledger | None:
    """The ledger of the HTTP request in whose context this runs; a task can outlive the request it was started by."""
    ledger = current_ledger.get()
    return None if ledger is None or ledger.closed else ledger


def _matters(output: Any) -> bool:
    """Whether an output may carry an account or end a sequence: a look at two fields, for it comes with every token."""
    return output.kv_transfer_params is not None or output.finish_reason is not None


def _pop_account(output: Any) -> Account | Growth | None:
    """Take the account out of an engine output, which vLLM would hand on to the client."""
    account: Account | Growth | None = (output.kv_transfer_params or {}).pop(ACCOUNT_KEY, None)
    output.kv_transfer_params = output.kv_transfer_params or None
    return account


def _several(outputs: list[Any], states: dict[str, Any]) -> dict[str, tuple[Any, int]]:
    """Of outputs with more than one token, as drafts bring them, by sequence: vLLM's detokenizer, and how many tokens
    it will have if it keeps them all. states: vLLM's, of the sequences that go on."""
    found = {}
    for output in outputs:
        state = states.get(output.request_id)
        if state is not None and len(output.new_token_ids) > 1:
            count = state.detokenizer.num_output_tokens() + len(output.new_token_ids)
            found[output.request_id] = (state.detokenizer, count)
    return found


def _is_last(output: Any) -> bool:
    """Whether the engine will say no more of this sequence: it finished, or is the account of an aborted one."""
    return output.finished or not output.new_token_ids


def _is_of_an_abort(output: Any) -> bool:
    """Whether our scheduler made this output (`fraqtl_vllm.accounting`), for the account of an aborted sequence."""
    return not output.finished and not output.new_token_ids


def _has_failed(output: Any) -> bool:
    """Whether the engine could not run this sequence: then it gives no account of it."""
    return output.finish_reason is FinishReason.ERROR
