"""Watches the block pool of a live engine, to compare with what the server reports.

    --scheduler-cls tests.e2e.witness.witnessed_scheduler   FRAQTL_WITNESS=/file/to/write.jsonl
    --worker-extension-cls tests.e2e.witness.Pages

It reads no block table. It notes which blocks go in and out of vLLM's pool in whose name, and
gives every allocation a number of its own, so a block that was given back and handed out again is not
mistaken for a shared one. At each end, preemption and output it writes down what every sequence
concerned holds; at each end, whether its notes agree with the pool about every block.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "FRAQTL_WITNESS"
Owner = tuple[str, int]  # the engine's id of a sequence, and the KV-cache group
# All of a group's block manager that can move blocks; the first argument is the sequence.
MOVES = (
    "add_local_computed_blocks",
    "allocate_external_computed_blocks",
    "allocate_new_blocks",
    "remove_skipped_blocks",
    "free",
)


class Witness:
    def __init__(self, scheduler: Any, file: Path) -> None:
        self._out = file.open("a", buffering=1)
        self._scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._groups = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._owner: Owner | None = None
        self._allocations = 0
        self._number: dict[int, int] = {}  # by block: the number of its present allocation
        self._loading = False  # whether blocks that move now are filled from a store
        self._held: dict[Owner, dict[int, str]] = {}  # by block: whether it is "new", "found" in the cache, or "loaded"
        self._parted: Counter[int] = Counter()  # blocks of ended sequences that a running step may still write
        self._watch_groups()
        self._watch_pool()
        self._watch_scheduler()

    # ---- what moves

    @contextmanager
    def _in_the_name_of(self, owner: Owner) -> Iterator[None]:
        outer, self._owner = self._owner, owner
        try:
            yield
        finally:
            self._owner = outer

    def _watch_groups(self) -> None:
        for group, manager in enumerate(self._groups):
            for name in MOVES:
                setattr(manager, name, self._named(getattr(manager, name), group))
            manager.pop_blocks_for_free = self._watched_pop(manager.pop_blocks_for_free, group)

    def _named(self, method: Callable[..., Any], group: int) -> Callable[..., Any]:
        def named(request_id: str, *args: Any, **kwargs: Any) -> Any:
            self._loading = method.__name__ == "allocate_external_computed_blocks"
            with self._in_the_name_of((request_id, group)):
                return method(request_id, *args, **kwargs)

        return named

    def _watched_pop(self, pop: Callable[[str], Any], group: int) -> Callable[[str], Any]:
        def watched_pop(request_id: str) -> Any:
            blocks = pop(request_id)
            if self._owner is None:  # not inside `free`: the pool gets them later
                self._parted.update(b.block_id for b in blocks if not b.is_null)
                self._held.pop((request_id, group), None)
            return blocks

        return watched_pop

    def _watch_pool(self) -> None:
        get_new, touch, free = self._pool.get_new_blocks, self._pool.touch, self._pool.free_blocks

        def watched_get_new(num_blocks: int) -> Any:
            blocks = get_new(num_blocks)
            for block in blocks:
                self._allocations += 1
                self._number[block.block_id] = self._allocations
                self._mine()[block.block_id] = "loaded" if self._loading else "new"
            return blocks

        def watched_touch(blocks: Any) -> None:
            touch(blocks)
            self._mine().update({b.block_id: "found" for b in blocks if not b.is_null})

        def watched_free(ordered_blocks: Iterable[Any]) -> None:
            blocks = list(ordered_blocks)
            free(blocks)
            ids = [b.block_id for b in blocks if not b.is_null]
            if self._owner is not None:
                for block in ids:
                    self._mine().pop(block)
            else:
                self._parted.subtract(ids)

        self._pool.get_new_blocks, self._pool.touch, self._pool.free_blocks = (
            watched_get_new,
            watched_touch,
            watched_free,
        )

    def _mine(self) -> dict[int, str]:
        assert self._owner is not None, "blocks moved in nobody's name"
        return self._held.setdefault(self._owner, {})

    # ---- what is written down

    def _watch_scheduler(self) -> None:
        release, update = self._scheduler._free_request_blocks, self._scheduler.update_from_output

        def watched_release(request: Any) -> None:
            self._write("end" if request.is_finished() else "preempted", request, **self._state_of_the_pool())
            release(request)
            for group in range(len(self._groups)):
                self._held.pop((request.request_id, group), None)

        def watched_update(*args: Any, **kwargs: Any) -> Any:
            outputs = update(*args, **kwargs)
            said = {o.request_id for client in outputs.values() for o in client.outputs}
            for key in said & self._scheduler.requests.keys():
                self._write("output", self._scheduler.requests[key])
            return outputs

        self._scheduler._free_request_blocks, self._scheduler.update_from_output = watched_release, watched_update

    def _write(self, event: str, request: Any, **more: Any) -> None:
        held = [self._held.get((request.request_id, g), {}) for g in range(len(self._groups))]
        line = {
            "event": event,
            "sequence": request.request_id,
            "status": request.status.name,
            "length": request.num_tokens,
            "written": request.num_computed_tokens,
            "blocks": [[self._number[b] for b in blocks] for blocks in held],
            "shared": [[self._number[b] for b, origin in blocks.items() if origin != "new"] for blocks in held],
            "loaded": [[self._number[b] for b, origin in blocks.items() if origin == "loaded"] for blocks in held],
            **more,
        }
        self._out.write(json.dumps(line) + "\n")

    def _state_of_the_pool(self) -> dict[str, Any]:
        """Usable, free and held blocks, and how many blocks the pool counts other users of than these notes."""
        holders = Counter(block for blocks in self._held.values() for block in blocks)
        holders.update(self._parted)
        blocks = [block for block in self._pool.blocks if not block.is_null]
        return {
            "usable": len(blocks),
            "free": self._pool.get_num_free_blocks(),
            "held": sum(count > 0 for count in holders.values()),
            "disputed": sum(block.ref_cnt != holders[block.block_id] for block in blocks),
        }


def witnessed_scheduler(**options: Any) -> Any:
    """Our accounting scheduler with a witness beside it."""
    from fraqtl_vllm.accounting.scheduler import accounting_scheduler

    scheduler: Any = accounting_scheduler(**options)
    scheduler.fraqtl_witness = Witness(scheduler, Path(os.environ[FILE]))
    return scheduler


class Pages:
    """Mixed into vLLM's workers: what a block takes, from the tensors that hold the pool."""

    def fraqtl_pages(self) -> dict[str, Any]:
        """By group of layers the bytes of a block, padding included, and whether it holds states."""
        runner = self.model_runner  # type: ignore[attr-defined]
        context = runner.compilation_config.static_forward_context
        layers = [[context[name] for name in g.layer_names] for g in runner.kv_cache_config.kv_cache_groups]
        # Where blocks lie one after the other, every layer's stride is the whole block.
        whole = max if runner.cache_config.get_resolved_kv_cache_layout().is_block_outermost else sum
        return {
            "block_bytes": [whole(map(_block_bytes, group)) for group in layers],
            "keeps_states": [isinstance(group[0].kv_cache, tuple) for group in layers],
        }


def _block_bytes(layer: Any) -> int:
    """From one block of a layer to the next."""
    cache = layer.kv_cache[0] if isinstance(layer.kv_cache, list | tuple) else layer.kv_cache
    return int(cache.stride(0) * cache.element_size())
