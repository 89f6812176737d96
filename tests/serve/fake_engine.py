"""An engine client that looks like vLLM's `AsyncLLM` to our accounting, with nothing behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutput, FinishReason

from fraqtl_vllm.accounting.schema import ACCOUNT_KEY, Account


def account(
    *blocks: list[int],
    tokens: int = 20,
    block_size: tuple[int, ...] = (16,),
    block_bytes: tuple[int, ...] = (2176,),
    baseline_block_bytes: tuple[int, ...] = (8192,),
    state_block_bytes: tuple[int, ...] = (),
    shared: tuple[list[int], ...] = (),
    loaded: tuple[list[int], ...] = (),
    engine: int = 0,
) -> Account:
    """What the engine says about a sequence: for every KV-cache group its blocks, and which were cached or loaded.

    The sizes are those of one layer with two heads of 64 dimensions: 2 · 16 · 68 and 2 · 16 · 256 bytes.
    """
    return {
        "engine": engine,
        "tokens": tokens,
        "blocks": list(blocks),
        "shared": list(shared) or [[] for _ in blocks],
        "loaded": list(loaded) or [[] for _ in blocks],
        "block_size": list(block_size),
        "block_bytes": list(block_bytes),
        "baseline_block_bytes": list(baseline_block_bytes),
        "state_block_bytes": list(state_block_bytes) or [0] * len(block_bytes),
    }


class FakeDetokenizer:
    """Of one sequence: keeps as many of an output's tokens as `keeps` says, as vLLM's does after a stop string."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.keeps: int | None = None

    def num_output_tokens(self) -> int:
        return len(self.tokens)


class FakeProcessor:
    """In the place of vLLM's `OutputProcessor`."""

    def __init__(self) -> None:
        self.stopped: set[str] = set()  # sequences whose next output completes a stop string
        self.request_states: dict[str, Any] = {}
        self.external_req_ids: dict[str, list[str]] = {}
        self.seen: list[Any] = []
        self.propagated: list[Exception] = []

    def add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        state = SimpleNamespace(request=request, parent_req=parent_req, queue=queue, detokenizer=FakeDetokenizer())
        self.request_states[request.request_id] = state
        self.external_req_ids.setdefault(request.external_req_id, []).append(request.request_id)

    def abort_requests(self, request_ids: list[str], internal: bool) -> list[str]:
        """Ends the answers at once, as vLLM does."""
        if not internal:
            request_ids = [key for name in request_ids for key in self.external_req_ids.get(name, ())]
        states = {key: state for key in request_ids if (state := self.request_states.pop(key, None))}
        for key, state in states.items():
            if state.queue is not None:
                state.queue.put(f"{key} was aborted")
        return list(states)

    def process_outputs(self, engine_core_outputs: list[Any], timestamp: float | None = None) -> str:
        self.seen += engine_core_outputs
        for output in engine_core_outputs:
            if (state := self.request_states.get(output.request_id)) is not None:
                state.detokenizer.tokens += output.new_token_ids[: state.detokenizer.keeps]
            if output.finished or output.request_id in self.stopped:
                self.request_states.pop(output.request_id, None)
        return f"processed {len(engine_core_outputs)} at {timestamp}"

    def propagate_error(self, error: Exception) -> None:
        self.propagated.append(error)


class FakeCore:
    """In the place of vLLM's `AsyncMPClient`: the way to the engine's process."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.client_index = 3
        self.called: list[tuple[Any, ...]] = []  # what was asked of all engines
        self.broken: BaseException | None = None  # what sending ends with

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        if self.broken is not None:
            raise self.broken
        self.called.append((method, *args))
        return [None]

    async def add_request_async(self, request: Any) -> None:
        if self.broken is not None:
            raise self.broken
        self.sent.append(request.request_id)


class FakeEngine:
    def __init__(self, *accounts: Account) -> None:
        self.accounts = accounts
        self._seen: Counter[str] = Counter()
        self.output_processor = FakeProcessor()
        self.engine_core = FakeCore()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[str, None]:
        """Ends every sequence at once, each with its own one of `accounts`."""
        for key, said in zip(self.admit(request_id, sampling_params.n), self.accounts, strict=False):
            self.say(key, {ACCOUNT_KEY: said}, finish=True)
        yield f"{prompt} {options}"

    def admit(self, request_id: str, n: int = 1, queue: Any = None) -> list[str]:
        """Know a request as vLLM does; returns the engine's own ids of its sequences.

        They end with something that no other request has: the first with `-5eed`, a second with this id with `-5eee`.
        """
        own = f"{request_id}-{0x5EED + self._seen[request_id]:x}"
        self._seen[request_id] += 1
        if n == 1:
            keys, parent = [own], None
        else:
            keys, parent = [f"{i}_{own}" for i in range(n)], SimpleNamespace(external_req_id=request_id)
        for index, key in enumerate(keys):
            request = SimpleNamespace(request_id=key, external_req_id=request_id)
            self.output_processor.add_request(request, "hi", parent, index, queue)
        return keys

    def abort(self, key: str) -> None:
        """Forget a sequence as vLLM does when its client has gone."""
        self.output_processor.request_states.pop(key)

    def last_account(self, key: str, said: Account) -> None:
        """What the engine says of an aborted sequence, afterwards."""
        output = EngineCoreOutput(request_id=key, new_token_ids=[], kv_transfer_params={ACCOUNT_KEY: said})
        self.output_processor.process_outputs([output])

    def say(
        self, key: str, kv_transfer_params: dict[str, Any] | None = None, *, finish: bool = False, tokens: int = 1
    ) -> Any:
        """Send one output of the sequence `key` through the processor; returns that output."""
        output = EngineCoreOutput(
            request_id=key,
            new_token_ids=[1] * tokens,
            finish_reason=FinishReason.STOP if finish else None,
            kv_transfer_params=kv_transfer_params,
        )
        self.output_processor.process_outputs([output])
        return output
