from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, FinishReason

from fraqtl_serve.engine import beams
from fraqtl_serve.engine.accounting import Accounting, ask_for_accounts, current_ledger
from fraqtl_serve.reports.report import Ledger
from fraqtl_vllm.accounting.schema import ACCOUNT_KEY
from tests.serve.fake_engine import FakeEngine, account

ONE = SimpleNamespace(n=1)
TWO = SimpleNamespace(n=2)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def accounting(engine: FakeEngine) -> Accounting:
    accounting = Accounting("k4v4")
    accounting.watch(engine)
    return accounting


def in_context(function: Any) -> Any:
    """Run in a context of its own, as an HTTP request does."""

    async def run() -> Any:
        return function()

    return asyncio.run(run())


def start(accounting: Accounting, engine: FakeEngine, request_id: str = "r", params: Any = ONE) -> Ledger:
    def handle() -> Ledger:
        ledger = accounting.open()
        engine.generate("hi", params, request_id)
        return ledger

    ledger: Ledger = in_context(handle)
    return ledger


def admit(engine: FakeEngine, ledger: Ledger, request_id: str = "r", n: int = 1, queue: Any = None) -> list[str]:
    """Have vLLM take a request in the context of the HTTP request that `ledger` is of."""

    def handle() -> list[str]:
        current_ledger.set(ledger)
        return engine.admit(request_id, n, queue)

    keys: list[str] = in_context(handle)
    return keys


def test_account_goes_to_the_ledger_of_its_request(accounting: Accounting, engine: FakeEngine) -> None:
    first, second = start(accounting, engine, "first"), start(accounting, engine, "second")
    (key,) = admit(engine, first, "first")
    engine.say(key, {ACCOUNT_KEY: account([1, 2])})
    assert first.accounts == {"first-5eed": account([1, 2])}
    assert second.accounts == {}
    assert (first.sequences, first.kv_format) == (1, "k4v4")


def test_account_is_taken_out_of_the_output(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    assert engine.say(key, {ACCOUNT_KEY: account([1])}).kv_transfer_params is None
    kept = engine.say(key, {ACCOUNT_KEY: account([1]), "remote_host": "10.0.0.1"})
    assert kept.kv_transfer_params == {"remote_host": "10.0.0.1"}


def test_outputs_without_an_account_are_left_alone(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    assert engine.say(key).kv_transfer_params is None
    assert engine.say(key, {"remote_host": "10.0.0.1"}).kv_transfer_params == {"remote_host": "10.0.0.1"}
    assert [output.request_id for output in engine.output_processor.seen] == [key, key]


def test_last_account_of_a_sequence_counts(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    engine.say(key, {ACCOUNT_KEY: account([1], tokens=16)})
    engine.say(key, {ACCOUNT_KEY: account([1, 2], tokens=17)})
    assert ledger.accounts == {key: account([1, 2], tokens=17)}


def test_what_has_not_changed_is_not_said_again(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    engine.say(key, {ACCOUNT_KEY: account([1], tokens=15)})
    engine.say(key, {ACCOUNT_KEY: {"tokens": 16}})
    assert ledger.accounts == {key: account([1], tokens=16)}


def test_sequences_of_one_request_share_its_ledger(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = start(accounting, engine, params=TWO)
    first, second = admit(engine, ledger, n=2)
    engine.say(first, {ACCOUNT_KEY: account([1, 2])})
    engine.say(second, {ACCOUNT_KEY: account([1, 3])})
    assert ledger.sequences == 2
    assert ledger.accounts == {"0_r-5eed": account([1, 2]), "1_r-5eed": account([1, 3])}


def test_prompts_of_one_request_share_its_ledger(accounting: Accounting, engine: FakeEngine) -> None:
    def handle() -> Ledger:
        ledger = accounting.open()
        engine.generate("hi", TWO, "cmpl-0")
        engine.generate("ho", ONE, "cmpl-1")
        return ledger

    ledger = in_context(handle)
    for key in (*admit(engine, ledger, "cmpl-0", n=2), *admit(engine, ledger, "cmpl-1")):
        engine.say(key, {ACCOUNT_KEY: account([1])})
    assert ledger.sequences == 3
    assert sorted(ledger.accounts) == ["0_cmpl-0-5eed", "1_cmpl-0-5eed", "cmpl-1-5eed"]


def test_sequences_nobody_knows_are_ignored(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = start(accounting, engine)
    assert engine.say("stranger-5eed", {ACCOUNT_KEY: account([1])}).kv_transfer_params is None
    (unwatched,) = engine.admit("another")  # a request that no ledger was opened for
    assert engine.say(unwatched, {ACCOUNT_KEY: account([1])}).kv_transfer_params is None
    assert ledger.accounts == {}


@pytest.fixture
def settled(accounting: Accounting) -> list[Ledger]:
    ledgers: list[Ledger] = []
    accounting._on_settled = ledgers.append
    return ledgers


def test_finished_request_settles_when_it_is_closed(
    accounting: Accounting, engine: FakeEngine, settled: list[Ledger]
) -> None:
    ledger = start(accounting, engine, params=TWO)
    first, second = admit(engine, ledger, n=2)
    engine.say(first, {ACCOUNT_KEY: account([1])}, finish=True)
    engine.say(second, {ACCOUNT_KEY: account([2])}, finish=True)
    assert settled == []
    accounting.close(ledger)
    accounting.close(ledger)
    assert settled == [ledger]
    assert ledger.finished == ledger.started == {first, second}
    assert accounting._sequences == {}


def test_aborted_request_settles_when_the_engine_gives_its_account(
    accounting: Accounting, engine: FakeEngine, settled: list[Ledger]
) -> None:
    ledger = start(accounting, engine, params=TWO)
    first, second = admit(engine, ledger, n=2)
    engine.say(first, {ACCOUNT_KEY: account([1])}, finish=True)
    engine.abort(second)
    accounting.close(ledger)
    engine.say(second)  # a token that was on its way
    assert settled == []
    engine.last_account(second, account([2, 3]))
    assert settled == [ledger]
    assert ledger.finished == {first}
    assert ledger.accounts == {first: account([1]), second: account([2, 3])}
    assert accounting._sequences == {}


def test_account_of_every_token_does_not_end_a_sequence(
    accounting: Accounting, engine: FakeEngine, settled: list[Ledger]
) -> None:
    # A request with a stop string is aborted while accounts of its tokens are on their way.
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    engine.say(key, {ACCOUNT_KEY: account([1])})
    engine.abort(key)
    accounting.close(ledger)
    engine.say(key, {ACCOUNT_KEY: account([1, 2])})
    assert settled == []
    engine.last_account(key, account([1, 2, 3]))
    assert (settled, ledger.finished) == ([ledger], set())
    assert ledger.accounts == {key: account([1, 2, 3])}


def test_stop_string_finishes_a_sequence(accounting: Accounting, engine: FakeEngine, settled: list[Ledger]) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    engine.output_processor.stopped.add(key)
    engine.say(key, {ACCOUNT_KEY: account([1])})
    accounting.close(ledger)
    assert (settled, ledger.finished) == ([ledger], {key})
    engine.output_processor.request_states[key] = None  # the engine, not told yet, made another token
    engine.say(key, {ACCOUNT_KEY: account([1, 2])})
    assert (settled, ledger.accounts) == ([ledger], {key: account([1])})


@pytest.mark.parametrize("kept", [1, 3, 4])
def test_tokens_after_a_stop_string_are_none_of_the_text(accounting: Accounting, engine: FakeEngine, kept: int) -> None:
    """A step with drafts brings several tokens at once, and its stop string may end before the last of them."""
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    engine.say(key, {ACCOUNT_KEY: account([1], tokens=20)}, tokens=4)
    engine.output_processor.stopped.add(key)
    engine.output_processor.request_states[key].detokenizer.keeps = kept
    engine.say(key, {ACCOUNT_KEY: account([1, 2], tokens=24)}, tokens=4)
    assert ledger.accounts == {key: account([1, 2], tokens=20 + kept)}


@pytest.mark.parametrize("error", [asyncio.CancelledError(), RuntimeError("the engine is dead")])
def test_sequence_that_was_never_sent_is_not_waited_for(
    accounting: Accounting, engine: FakeEngine, settled: list[Ledger], error: BaseException
) -> None:
    ledger = start(accounting, engine, params=TWO)
    first, second = admit(engine, ledger, n=2)
    asyncio.run(engine.engine_core.add_request_async(SimpleNamespace(request_id=first)))
    engine.engine_core.broken = error
    with pytest.raises(type(error)):
        asyncio.run(engine.engine_core.add_request_async(SimpleNamespace(request_id=second)))
    assert engine.engine_core.sent == [first]
    accounting.close(ledger)
    assert settled == []
    engine.abort(first)
    engine.last_account(first, account([1]))
    assert settled == [ledger]
    assert (ledger.started, ledger.finished) == ({first}, set())
    assert accounting._sequences == {}


def test_request_of_which_nothing_was_sent_leaves_nothing_behind(
    accounting: Accounting, engine: FakeEngine, settled: list[Ledger]
) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    engine.engine_core.broken = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(engine.engine_core.add_request_async(SimpleNamespace(request_id=key)))
    accounting.close(ledger)
    assert (settled, accounting._sequences) == ([], {})
    assert engine.output_processor.request_states == {}


def test_number_that_no_message_holds_is_the_clients_mistake(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    engine.engine_core.broken = OverflowError("can't serialize ints >= 2**64")
    with pytest.raises(VLLMValidationError, match="can't be used"):
        asyncio.run(engine.engine_core.add_request_async(SimpleNamespace(request_id=key)))
    assert accounting._sequences == {}


def test_sequence_that_the_engine_could_not_run_ends(
    accounting: Accounting, engine: FakeEngine, settled: list[Ledger]
) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    output = EngineCoreOutput(key, [], finish_reason=FinishReason.ERROR)
    engine.output_processor.process_outputs([output])
    accounting.close(ledger)
    assert (settled, accounting._sequences) == ([ledger], {})
    assert ledger.report() is None
    assert ledger.finished == set()


class Handler:
    """Searches as vLLM's handlers do: every round is made of requests of its own."""

    def __init__(self, engine: FakeEngine, bases: dict[str, int]) -> None:
        self.engine = engine
        self.bases = bases

    async def beam_search(self, prompt: str, request_id: str, params: Any = None) -> AsyncGenerator[str, None]:
        base = self.bases[request_id]
        for step in range(3):
            name = f"{request_id}-{step + 7:016x}"
            await asyncio.gather(*(self.beam(f"{name}-beam-{i}", step, base, i) for i in range(1 if step == 0 else 2)))
            await asyncio.sleep(0)
        yield prompt

    async def beam(self, name: str, step: int, base: int, i: int) -> None:
        self.engine.generate("hi", ONE, name)
        await asyncio.sleep(0)
        (key,) = self.engine.admit(name)
        await asyncio.sleep(0)
        self.engine.say(key, {ACCOUNT_KEY: account([base, base + 1 + i], tokens=20 + step)}, finish=True)


class Watched(Handler):
    pass


@pytest.mark.parametrize(
    "ids", [("cmpl-1-0", "cmpl-1-1"), ("a-0123456789abcdef-beam-1", "a-0123456789abcdef-beam-1-2")]
)
def test_beams_count_as_they_are_in_their_last_round(
    accounting: Accounting, engine: FakeEngine, ids: tuple[str, str]
) -> None:
    beams.watch(Watched)
    beams.watch(Watched)  # once for a class: a second time changes nothing
    handler = Watched(engine, {ids[0]: 10, ids[1]: 20})

    async def search(request_id: str) -> list[str]:
        found = [found async for found in handler.beam_search("hi", request_id=request_id)]
        assert beams.current_search.get() is None
        return found

    async def run() -> Ledger:
        ledger = accounting.open()
        assert await asyncio.gather(*map(search, ids)) == [["hi"], ["hi"]]
        return ledger

    ledger = asyncio.run(run())
    report = ledger.report()
    assert report is not None
    assert (report.tokens, report.blocks, ledger.sequences) == (4 * 22, 6, 4)
    accounting.close(ledger)
    assert ledger.is_settled and ledger.finished == ledger.started
    assert accounting._sequences == {}
    assert ledger.request_id == ids[0]


@pytest.mark.parametrize("name", ["p-0123456789abcdef-beam-1", "x" * 200_000])
def test_what_an_id_looks_like_changes_nothing(accounting: Accounting, engine: FakeEngine, name: str) -> None:
    ledger = start(accounting, engine, name, TWO)
    for turn in range(2):  # two turns of one response, with one id
        for key in admit(engine, ledger, name, n=2):
            engine.say(key, {ACCOUNT_KEY: account([turn])}, finish=True)
    assert (len(ledger.accounts), ledger.sequences, ledger.request_id) == (4, 2, name)


def test_equal_ids_at_the_same_time(accounting: Accounting, engine: FakeEngine, settled: list[Ledger]) -> None:
    async def request(number: int) -> Ledger:
        ledger = accounting.open()
        engine.generate("hi", TWO, "same")
        await asyncio.sleep(0)  # every request has got so far before any is taken
        keys = engine.admit("same", n=2)
        await asyncio.sleep(0)
        for key in keys:
            engine.say(key, {ACCOUNT_KEY: account([number], tokens=number)}, finish=True)
        accounting.close(ledger)
        return ledger

    async def run() -> list[Ledger]:
        return await asyncio.gather(*map(request, range(8)))

    ledgers = asyncio.run(run())
    assert [sorted(a["tokens"] for a in ledger.accounts.values()) for ledger in ledgers] == [[i, i] for i in range(8)]
    assert len(settled) == 8
    assert all(ledger.finished == ledger.started for ledger in ledgers)


def test_account_of_an_abort_is_no_output(accounting: Accounting, engine: FakeEngine) -> None:
    """Nor is it one for a request without a ledger, which still runs here when the engine has ended it."""
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    (unwatched,) = engine.admit("another")
    outputs = [EngineCoreOutput(name, [], kv_transfer_params={ACCOUNT_KEY: account([1])}) for name in (key, unwatched)]
    ends = [EngineCoreOutput(name, [], finish_reason=FinishReason.ABORT) for name in (key, unwatched)]
    engine.output_processor.process_outputs([*outputs, *ends])
    assert engine.output_processor.seen == ends
    report = ledger.report()
    assert report is not None and report.blocks == 1
    accounting.close(ledger)
    assert ledger.is_settled and ledger.finished == set()


class Queue(list[Any]):
    """In the place of vLLM's collector of a request's outputs."""

    put = list.append


@pytest.mark.parametrize("internal", [True, False])
def test_answer_that_is_aborted_here_waits_for_its_account(
    accounting: Accounting, engine: FakeEngine, internal: bool
) -> None:
    ledger, queue = start(accounting, engine, params=TWO), Queue()
    first, second = admit(engine, ledger, n=2, queue=queue)
    processor = engine.output_processor
    assert processor.abort_requests([first, second] if internal else ["r"], internal) == [first, second]
    assert queue == []
    outputs = [EngineCoreOutput(key, [], kv_transfer_params={ACCOUNT_KEY: account([1])}) for key in (first, second)]
    processor.process_outputs(outputs)
    assert queue == [f"{first} was aborted", f"{second} was aborted"]
    assert ledger.ended == {first, second}


def test_answer_that_came_to_its_end_in_the_engine_does_not_wait_for_ever(
    accounting: Accounting, engine: FakeEngine
) -> None:
    ledger, queue = start(accounting, engine), Queue()
    (key,) = admit(engine, ledger, queue=queue)
    engine.output_processor.abort_requests([key], internal=True)
    engine.say(key, {ACCOUNT_KEY: account([1])}, finish=True)  # was on its way
    assert queue == [f"{key} was aborted"]


def test_a_dead_engine_holds_no_answer_up(accounting: Accounting, engine: FakeEngine) -> None:
    ledger, queue = start(accounting, engine), Queue()
    first, second = admit(engine, ledger, n=2, queue=queue)
    processor = engine.output_processor
    processor.abort_requests([first], internal=True)
    error = RuntimeError("the engine is dead")
    processor.propagate_error(error)
    assert (queue, processor.propagated) == ([f"{first} was aborted"], [error])
    processor.abort_requests([second], internal=True)
    assert queue == [f"{first} was aborted", f"{second} was aborted"]


@pytest.mark.parametrize("why", ["closed", "unknown"])
def test_answers_that_nobody_waits_for_are_not_held(accounting: Accounting, engine: FakeEngine, why: str) -> None:
    queue = Queue()
    if why == "closed":
        ledger = start(accounting, engine)
        (key,) = admit(engine, ledger, queue=queue)
        accounting.close(ledger)
    else:
        (key,) = engine.admit("r", queue=queue)
    engine.output_processor.abort_requests([key], internal=True)
    assert queue == [f"{key} was aborted"]


def test_engines_are_asked_for_accounts(engine: FakeEngine) -> None:
    assert asyncio.run(ask_for_accounts(engine)) is None
    assert engine.engine_core.called == [("fraqtl_send_accounts", 3)]
    engine.engine_core.broken = RuntimeError("no such method")
    assert asyncio.run(ask_for_accounts(engine)) == "no such method"


def test_two_ends_in_one_batch_of_outputs(accounting: Accounting, engine: FakeEngine, settled: list[Ledger]) -> None:
    ledger = start(accounting, engine)
    (key,) = admit(engine, ledger)
    accounting.close(ledger)
    outputs = [EngineCoreOutput(key, [], kv_transfer_params={ACCOUNT_KEY: account([1])}) for _ in range(2)]
    engine.abort(key)
    engine.output_processor.process_outputs(outputs)
    assert settled == [ledger]


def test_request_that_the_engine_never_saw_is_not_settled(
    accounting: Accounting, engine: FakeEngine, settled: list[Ledger]
) -> None:
    accounting.close(in_context(accounting.open))
    accounting.close(start(accounting, engine))  # its prompt was refused after all
    assert settled == []


def test_ledger_knows_where_it_comes_from(accounting: Accounting, engine: FakeEngine) -> None:
    ledger = in_context(lambda: accounting.open("/v1/completions"))
    assert ledger.endpoint == "/v1/completions"
    assert start(accounting, engine, "cmpl-1").request_id == "cmpl-1"


def test_close_is_done_once(accounting: Accounting, engine: FakeEngine) -> None:
    first = start(accounting, engine, "first", TWO)
    accounting.close(first)
    accounting.close(first)
    assert first.closed and not first.started


def test_task_that_outlives_its_request_reopens_nothing(accounting: Accounting, engine: FakeEngine) -> None:
    async def run() -> Ledger:
        async def late() -> None:
            await asyncio.sleep(0.01)
            engine.generate("hi", ONE, "late")
            engine.admit("late")

        ledger = accounting.open()
        task = asyncio.create_task(late())
        accounting.close(ledger)
        await task
        return ledger

    ledger = asyncio.run(run())
    assert (accounting._sequences, ledger.sequences) == ({}, 0)


def test_requests_outside_http_are_not_accounted(accounting: Accounting, engine: FakeEngine) -> None:
    in_context(lambda: (engine.generate("hi", ONE, "r"), engine.admit("r")))
    assert accounting._sequences == {}


def test_concurrent_requests_do_not_mix(accounting: Accounting, engine: FakeEngine) -> None:
    async def request(number: int) -> Ledger:
        ledger = accounting.open()
        await asyncio.sleep(0)  # every other request opens its ledger before any of them generates
        engine.generate("hi", ONE, f"r{number}")
        await asyncio.sleep(0)
        (key,) = engine.admit(f"r{number}")
        engine.say(key, {ACCOUNT_KEY: account([number])})
        return ledger

    async def run() -> list[Ledger]:
        return await asyncio.gather(*map(request, range(8)))

    ledgers = asyncio.run(run())
    assert [ledger.accounts for ledger in ledgers] == [{f"r{i}-5eed": account([i])} for i in range(8)]


def test_wrapped_methods_pass_everything_on(accounting: Accounting, engine: FakeEngine) -> None:
    async def run() -> list[str]:
        return [out async for out in engine.generate("hi", ONE, request_id="r", lora_request="adapter", priority=3)]

    assert asyncio.run(run()) == ["hi {'lora_request': 'adapter', 'priority': 3}"]
    assert engine.output_processor.process_outputs([], timestamp=1.5) == "processed 0 at 1.5"


def test_vllm_has_what_is_wrapped() -> None:
    """The names that the fake engine stands for; a new vLLM must not drop them."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.output_processor import OutputProcessor

    assert list(inspect.signature(AsyncLLM.generate).parameters)[:4] == [
        "self",
        "prompt",
        "sampling_params",
        "request_id",
    ]
    assert list(inspect.signature(OutputProcessor.add_request).parameters) == [
        "self",
        "request",
        "prompt",
        "parent_req",
        "request_index",
        "queue",
    ]
    assert "engine_core_outputs" in inspect.signature(OutputProcessor.process_outputs).parameters
    assert list(inspect.signature(OutputProcessor.abort_requests).parameters) == ["self", "request_ids", "internal"]
    assert "external_req_ids" in OutputProcessor.__init__.__code__.co_names
    assert "call_utility_all_async" in dir(AsyncMPClient)
    assert list(inspect.signature(BeamSearchOnlineMixin.beam_search).parameters)[:3] == ["self", "prompt", "request_id"]
