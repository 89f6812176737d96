"""vLLM's scheduler, which also says which KV blocks a request held when it ended.

`--scheduler-cls fraqtl_vllm.accounting.scheduler.accounting_scheduler` puts an account under the key
"fraqtl" of the `kv_transfer_params` that vLLM carries from the engine to the API server. The
server's plugin takes it out again, so clients never see it there. Only to an API server that asked for
accounts is any sent (`fraqtl_vllm.accounting.engine`).

vLLM sends no output for an aborted request. Ours has one, without tokens, that carries the account;
it is for the server's plugin alone, which keeps it from vLLM.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fraqtl_vllm._vllm import (
    AsyncScheduler,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreProc,
    FullAttentionSpec,
    KVCacheConfig,
    Request,
    RequestStatus,
    Scheduler,
    VllmConfig,
)
from fraqtl_vllm.accounting import engine
from fraqtl_vllm.accounting.allocations import Allocations
from fraqtl_vllm.accounting.pool import GROUP_NOTE
from fraqtl_vllm.accounting.schema import ACCOUNT_KEY, Account, GroupBytes, Growth, Sizes
from fraqtl_vllm.start import garbage


class _Accounting:
    """Mixed into a scheduler class. What it reads is the block manager's own table."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, kv_cache_config=kv_cache_config, **options)  # type: ignore[call-arg]
        self._clients: set[int] = set()  # the API servers that take accounts, by vLLM's numbers of them
        self._last_accounts: defaultdict[int, list[EngineCoreOutput]] = defaultdict(list)  # of aborted requests
        self._allocations = Allocations(self.kv_cache_manager)  # type: ignore[attr-defined]
        self._told: dict[str, tuple[int, ...]] = {}
        self._tables_only_grow = all(
            type(group.kv_cache_spec) is FullAttentionSpec for group in kv_cache_config.kv_cache_groups
        )
        of_groups: GroupBytes = getattr(kv_cache_config, GROUP_NOTE)
        self._sizes: Sizes = {
            "engine": vllm_config.parallel_config.data_parallel_index,
            "block_size": [g.kv_cache_spec.block_size for g in kv_cache_config.kv_cache_groups],
            **of_groups,
        }

    def send_accounts_to(self, client_index: int) -> None:
        """From now on, account for the requests of this API server; it promises to take the accounts out again."""
        self._clients.add(client_index)

    def take_last_accounts(self) -> dict[int, list[EngineCoreOutput]]:
        """The accounts of aborted requests that were not sent yet, by API server."""
        taken, self._last_accounts = self._last_accounts, defaultdict(list)
        return taken

    def account(self, request: Request) -> Account:
        """What `request` holds now."""
        tables = self.kv_cache_manager.get_blocks(request.request_id).blocks  # type: ignore[attr-defined]
        # A sliding window leaves null blocks behind.
        held = [[block.block_id for block in table if not block.is_null] for table in tables]
        watched, key = self._allocations, request.request_id
        found = [[b for b in group if watched.found_in_cache(key, g, b)] for g, group in enumerate(held)]
        loaded = [[b for b in group if watched.loaded_from_store(key, g, b)] for g, group in enumerate(held)]
        return {
            "tokens": max(0, request.num_tokens - 1),
            "blocks": self._names(held),
            "shared": self._names([mine + filled for mine, filled in zip(found, loaded, strict=True)]),
            "loaded": self._names(loaded),
            **self._sizes,
        }

    def _names(self, blocks: list[list[int]]) -> list[list[int]]:
        return [[self._allocations.name(b) for b in group] for group in blocks]

    def _news(self, request: Request) -> Account | Growth:
        """The account of a running request, or of it only the tokens if its blocks are those that were last told.

        A table can be as long as the context, and mostly it grows by a block every 16 tokens.
        """
        tables = self.kv_cache_manager.get_blocks(request.request_id).blocks  # type: ignore[attr-defined]
        state = (request.num_preemptions, *map(len, tables))
        if self._tables_only_grow and self._told.get(request.request_id) == state:
            return {"tokens": request.num_tokens - 1}
        self._told[request.request_id] = state
        return self.account(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        account = self.account(request) if request.client_index in self._clients else None
        self._allocations.forget(request.request_id)
        self._told.pop(request.request_id, None)
        if account is not None and request.status is RequestStatus.FINISHED_ABORTED:
            account["tokens"] = min(account["tokens"], request.num_computed_tokens)
            last = EngineCoreOutput(request.request_id, new_token_ids=[], kv_transfer_params={ACCOUNT_KEY: account})
            self._last_accounts[request.client_index].append(last)
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)  # type: ignore[misc]
        return (kv_params if account is None else {**(kv_params or {}), ACCOUNT_KEY: account}), ec_params

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for client_index, client in outputs.items():
            for output in client.outputs if client_index in self._clients else ():
                request = self.requests.get(output.request_id)  # type: ignore[attr-defined]
                # A stop string is found by the API server, after this: its last word must be known by then.
                if request is not None and request.sampling_params and request.sampling_params.stop:
                    output.kv_transfer_params = {
                        **(output.kv_transfer_params or {}),
                        ACCOUNT_KEY: self._news(request),
                    }
        for client_index, last in self.take_last_accounts().items():  # of requests that no call from outside aborted
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.extend(last)
        return outputs


class AccountingScheduler(_Accounting, Scheduler):
    """For synchronous scheduling."""


class AccountingAsyncScheduler(_Accounting, AsyncScheduler):
    """For asynchronous scheduling."""


def accounting_scheduler(*, vllm_config: VllmConfig, **options: Any) -> AccountingScheduler | AccountingAsyncScheduler:
    """Called by the engine in place of a scheduler class: only now is it settled which of the two runs."""
    engine.install(EngineCoreProc)
    garbage.collect_as_usual()  # the engine's start is over
    is_async = vllm_config.scheduler_config.async_scheduling
    return (AccountingAsyncScheduler if is_async else AccountingScheduler)(vllm_config=vllm_config, **options)
