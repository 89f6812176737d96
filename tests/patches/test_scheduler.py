from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import RequestStatus

from fraqtl_vllm.accounting.pool import GROUP_NOTE, group_bytes
from fraqtl_vllm.accounting.scheduler import _Accounting

PACKED: dict[str, Any] = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.uint8, "state_content_bytes": 68}
FULL = FullAttentionSpec(block_size=16, **PACKED)
WINDOW = SlidingWindowSpec(block_size=32, sliding_window=128, **PACKED)


def pool(*groups: tuple[Any, int]) -> KVCacheConfig:
    """A pool of so many layers of each spec."""
    layers = (KVCacheGroupSpec([f"layer.{i}" for i in range(count)], spec) for spec, count in groups)
    return KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=list(layers))


class FakeManager:
    """Admits sequences to blocks: as many new ones as asked for, after those of the prefix cache."""

    def __init__(self, tables: dict[str, list[list[Any]]]) -> None:
        self.tables = tables
        self.block_pool = SimpleNamespace(blocks=[None] * 100, get_new_blocks=lambda count: [])
        sizes = [SimpleNamespace(block_size=16), SimpleNamespace(block_size=32)]
        self.coordinator = SimpleNamespace(single_type_managers=sizes)
        self.room = True

    def get_blocks(self, key: str) -> Any:
        return SimpleNamespace(blocks=self.tables[key])

    def allocate_slots(self, request: Any, num_new_tokens: int, *, new_computed_blocks: Any = None, **_: int) -> Any:
        return SimpleNamespace(blocks=()) if self.room else None


class StockScheduler:
    """What the account reads of vLLM's scheduler: requests and their block tables."""

    def __init__(self, *, vllm_config: Any, kv_cache_config: Any, log_stats: bool = False) -> None:
        self.tables: dict[str, list[list[Any]]] = {}
        self.requests: dict[str, Any] = {}
        self.kv_cache_manager = FakeManager(self.tables)
        self.log_stats = log_stats
        self.connector_says: dict[str, Any] | None = None

    def _free_request(self, request: Any, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        del self.tables[request.request_id]
        return self.connector_says, {"delayed": delay_free_blocks}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        return model_runner_output


class Scheduler(_Accounting, StockScheduler):
    connector_says: dict[str, Any] | None


def make_scheduler(*groups: tuple[Any, int], world_size: int = 1) -> Any:
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=3), model_config=SimpleNamespace(dtype=torch.bfloat16)
    )
    planned = pool(*(groups or ((FULL, 1), (WINDOW, 1))))
    setattr(planned, GROUP_NOTE, group_bytes(config, [planned] * world_size))
    scheduler = Scheduler(vllm_config=config, kv_cache_config=planned, log_stats=True)
    assert scheduler.log_stats
    for client in (0, 3):
        scheduler.send_accounts_to(client)
    return scheduler


def admit(
    scheduler: Any, key: str, *tables: list[int], tokens: int = 40, computed: int | None = None, stop: Any = None
) -> Any:
    """A request with these block tables; 0 is vLLM's null block."""
    scheduler.tables[key] = [[SimpleNamespace(block_id=b, is_null=b == 0) for b in table] for table in tables]
    request = SimpleNamespace(
        request_id=key,
        num_tokens=tokens,
        num_computed_tokens=tokens if computed is None else computed,
        num_preemptions=0,
        sampling_params=SimpleNamespace(stop=stop),
        status=RequestStatus.FINISHED_STOPPED,
        client_index=0,
    )
    scheduler.requests[key] = request
    return request


def test_account_is_the_block_managers_table() -> None:
    scheduler = make_scheduler(world_size=2)
    request = admit(scheduler, "a", [5, 3, 9], [0, 0, 7], tokens=40)
    assert scheduler.account(request) == {
        "engine": 3,
        "tokens": 39,
        "blocks": [[5, 3, 9], [7]],
        "shared": [[], []],
        "loaded": [[], []],
        "block_size": [16, 32],
        "block_bytes": [4352, 8704],
        "baseline_block_bytes": [16384, 32768],
        "state_block_bytes": [0, 0],
    }


def test_account_before_the_first_token() -> None:
    scheduler = make_scheduler()
    account = scheduler.account(admit(scheduler, "a", [], [], tokens=0))
    assert (account["tokens"], account["blocks"], account["shared"]) == (0, [[], []], [[], []])


def computed(*groups: list[int]) -> Any:
    return SimpleNamespace(blocks=tuple([SimpleNamespace(block_id=b) for b in group] for group in groups))


def test_blocks_found_in_the_prefix_cache_are_those_of_the_last_admission() -> None:
    scheduler = make_scheduler()
    manager = scheduler.kv_cache_manager
    request = admit(scheduler, "a", [5, 3, 9], [0, 3, 7], computed=0)
    manager.allocate_slots(request, 20, new_computed_blocks=computed([5, 3], [0, 3]))
    manager.allocate_slots(request, 1)  # a running sequence grows
    assert scheduler.account(request)["shared"] == [[5, 3], [3]]
    manager.room = False  # preempted, and not admitted again yet
    manager.allocate_slots(request, 20, new_computed_blocks=computed([9], []))
    assert scheduler.account(request)["shared"] == [[5, 3], [3]]
    manager.room = True
    manager.allocate_slots(request, 20, new_computed_blocks=computed([5], []))
    assert scheduler.account(request)["shared"] == [[5], []]
    scheduler._free_request(request)
    assert scheduler._allocations._found == {}


def test_blocks_that_a_connector_fills_count_as_shared_and_as_loaded() -> None:
    scheduler = make_scheduler()
    manager = scheduler.kv_cache_manager
    request = admit(scheduler, "a", [5, 3, 9, 4], [0, 7, 8], computed=0)
    found: dict[str, Any] = {"new_computed_blocks": computed([5], []), "num_new_computed_tokens": 16}
    manager.allocate_slots(request, 0, num_external_computed_tokens=32, **found)
    account = scheduler.account(request)
    assert (account["shared"], account["loaded"]) == ([[5, 3, 9], [7]], [[3, 9], [7]])
    request.num_computed_tokens = 48  # the blocks are there: it is admitted once more, for the rest of its prompt
    manager.allocate_slots(request, 10, new_computed_blocks=computed([], []))
    assert scheduler.account(request) == account
    request.num_computed_tokens = 0  # preempted, and the pool has all of them now
    manager.allocate_slots(request, 10, new_computed_blocks=computed([5, 3, 9], [0, 7]), num_new_computed_tokens=48)
    account = scheduler.account(request)
    assert (account["shared"], account["loaded"]) == ([[5, 3, 9], [7]], [[], []])
    scheduler._free_request(request)
    assert scheduler._allocations._loaded == {}


def test_a_block_that_was_handed_out_again_has_another_number() -> None:
    scheduler = make_scheduler()
    pool = scheduler.kv_cache_manager.block_pool
    block = SimpleNamespace(block_id=5)
    pool.get_new_blocks = scheduler._allocations._watched_get(lambda count: [block] * count)
    names = []
    for key in ("a", "b", "c"):
        if key != "c":  # c shares the block with b
            pool.get_new_blocks(1)
        names.append(scheduler.account(admit(scheduler, key, [5], []))["blocks"])
    assert names == [[[105], []], [[205], []], [[205], []]]


def test_a_shared_block_that_is_handed_out_again_is_not_shared() -> None:
    scheduler = make_scheduler()
    request = admit(scheduler, "a", [5], [7], computed=0)
    scheduler.kv_cache_manager.allocate_slots(request, 20, new_computed_blocks=computed([5], [7]))
    assert scheduler.account(request)["shared"] == [[5], [7]]
    # The window left block 7 behind, and the sequence got it again for its next tokens.
    scheduler._allocations._watched_get(lambda count: [SimpleNamespace(block_id=7)])(1)
    assert scheduler.account(request)["shared"] == [[5], []]


def test_vllm_has_what_is_watched() -> None:
    """The names that the fake manager stands for; a new vLLM must not drop them."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    named = {"new_computed_blocks", "num_new_computed_tokens", "num_external_computed_tokens"}
    assert named <= inspect.signature(KVCacheManager.allocate_slots).parameters.keys()
    assert list(inspect.signature(BlockPool.get_new_blocks).parameters) == ["self", "num_blocks"]


@pytest.mark.parametrize("connector_says", [None, {"remote_host": "10.0.0.1"}])
def test_account_is_taken_before_the_blocks_are_freed(connector_says: dict[str, Any] | None) -> None:
    scheduler = make_scheduler()
    scheduler.connector_says = connector_says
    request = admit(scheduler, "a", [5], [7])
    kv_params, others = scheduler._free_request(request, delay_free_blocks=True)
    assert kv_params.pop("fraqtl")["blocks"] == [[5], [7]]
    assert kv_params == (connector_says or {})
    assert others == {"delayed": True}
    assert scheduler.tables == {}


def test_account_of_an_aborted_request_is_sent_with_the_next_step() -> None:
    scheduler = make_scheduler()
    for key, client, computed in (("a", 0, 24), ("b", 3, 40)):
        request = admit(scheduler, key, [5], [7], tokens=40)
        request.status, request.client_index, request.num_computed_tokens = (
            RequestStatus.FINISHED_ABORTED,
            client,
            computed,
        )
        scheduler._free_request(request)
        del scheduler.requests[key]
    running = SimpleNamespace(request_id="c", kv_transfer_params=None)
    clients = scheduler.update_from_output(None, {0: EngineCoreOutputs(outputs=[running])})
    assert sorted(clients) == [0, 3]
    (first, a), (b,) = clients[0].outputs, clients[3].outputs
    assert first is running
    assert (a.request_id, b.request_id) == ("a", "b")
    assert (a.new_token_ids, a.finish_reason) == ([], None)
    said = [output.kv_transfer_params["fraqtl"] for output in (a, b)]
    assert [account["blocks"] for account in said] == [[[5], [7]]] * 2
    assert [account["tokens"] for account in said] == [24, 39]  # of the first, only 24 were written yet
    assert scheduler.update_from_output(None, {}) == {}  # said once


def test_nobody_gets_accounts_who_did_not_ask() -> None:
    """Another front end than ours would hand them on to its clients."""
    scheduler = make_scheduler()
    for key, status in (("ended", RequestStatus.FINISHED_STOPPED), ("aborted", RequestStatus.FINISHED_ABORTED)):
        request = admit(scheduler, key, [5], [7])
        request.status, request.client_index = status, 1
        assert scheduler._free_request(request)[0] is None
    scheduler.connector_says = {"remote_host": "10.0.0.1"}
    request = admit(scheduler, "connected", [5], [7])
    request.client_index = 1
    assert scheduler._free_request(request)[0] == {"remote_host": "10.0.0.1"}
    admit(scheduler, "stops", [5], [7], stop=["\n"]).client_index = 1
    output = SimpleNamespace(request_id="stops", kv_transfer_params=None)
    assert sorted(scheduler.update_from_output(None, {1: SimpleNamespace(outputs=[output])})) == [1]
    assert output.kv_transfer_params is None
    assert scheduler.take_last_accounts() == {}


def test_finished_requests_are_not_sent_again() -> None:
    scheduler = make_scheduler()
    scheduler._free_request(admit(scheduler, "a", [5], [7]))
    assert scheduler.update_from_output(None, {}) == {}


def test_requests_with_a_stop_string_tell_after_every_step() -> None:
    # It is the API server that finds the string, when the engine has nothing left to say.
    scheduler = make_scheduler()
    admit(scheduler, "stops", [5], [7], stop=["\n"])
    admit(scheduler, "runs", [6], [8])
    outputs = [
        SimpleNamespace(request_id=key, kv_transfer_params=params)
        for key, params in (("stops", {"remote_host": "10.0.0.1"}), ("runs", None), ("gone", None))
    ]
    clients = scheduler.update_from_output(None, {0: SimpleNamespace(outputs=outputs)})
    stops, runs, gone = clients[0].outputs
    assert stops.kv_transfer_params["fraqtl"]["blocks"] == [[5], [7]]
    assert stops.kv_transfer_params["remote_host"] == "10.0.0.1"
    assert (runs.kv_transfer_params, gone.kv_transfer_params) == (None, None)


def say(scheduler: Any, key: str) -> dict[str, Any]:
    """What a step tells of a running request."""
    output = SimpleNamespace(request_id=key, kv_transfer_params=None)
    scheduler.update_from_output(None, {0: SimpleNamespace(outputs=[output])})
    said: dict[str, Any] = output.kv_transfer_params["fraqtl"]
    return said


def test_blocks_are_told_again_only_when_they_changed() -> None:
    scheduler = make_scheduler((FULL, 1))
    request = admit(scheduler, "a", [5], tokens=14, stop=["\n"])
    assert say(scheduler, "a")["blocks"] == [[5]]
    for request.num_tokens in (15, 16):
        assert say(scheduler, "a") == {"tokens": request.num_tokens - 1}
    scheduler.tables["a"][0].append(SimpleNamespace(block_id=7, is_null=False))
    assert say(scheduler, "a")["blocks"] == [[5, 7]]
    assert set(say(scheduler, "a")) == {"tokens"}
    request.num_preemptions = 1  # as many blocks, but others
    scheduler.tables["a"] = [[SimpleNamespace(block_id=b, is_null=False) for b in (9, 8)]]
    assert say(scheduler, "a")["blocks"] == [[9, 8]]
    kv_params, _ = scheduler._free_request(request)
    assert kv_params["fraqtl"]["blocks"] == [[9, 8]]
    assert scheduler._told == {}


def test_blocks_that_a_window_leaves_behind_are_told_of_at_once() -> None:
    scheduler = make_scheduler((FULL, 1), (WINDOW, 1))
    admit(scheduler, "a", [5, 6], [7, 8], stop=["\n"])
    assert say(scheduler, "a")["blocks"] == [[5, 6], [7, 8]]
    scheduler.tables["a"][1][0] = SimpleNamespace(block_id=0, is_null=True)
    assert say(scheduler, "a")["blocks"] == [[5, 6], [8]]


def test_pooling_requests_have_no_sampling_parameters() -> None:
    scheduler = make_scheduler()
    admit(scheduler, "a", [5], [7]).sampling_params = None
    output = SimpleNamespace(request_id="a", kv_transfer_params=None)
    scheduler.update_from_output(None, {0: SimpleNamespace(outputs=[output])})
    assert output.kv_transfer_params is None
