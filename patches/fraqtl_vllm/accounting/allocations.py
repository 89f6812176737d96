"""Which blocks of a request came from the prefix cache or a store, and which allocation of a block it is.

vLLM's block tables don't say either. A block's number is not enough to tell whether two sequences of a
request shared it: the second may have got it after the first had given it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fraqtl_vllm import hooks


class Allocations:
    """Watches a KV-cache manager: one step more for every allocation, nothing of it is changed."""

    def __init__(self, manager: Any) -> None:
        self._blocks = len(manager.block_pool.blocks)
        self._turn = [0] * self._blocks  # by block: how often it was handed out
        self._manager = manager
        self._found: dict[str, list[set[int]]] = {}  # by sequence and group: names of blocks from the prefix cache
        self._loaded: dict[str, list[set[int]]] = {}  # the same of blocks that a connector fills from its store
        hooks.ADMISSIONS.wrap(manager, self._watched_allocate)
        hooks.HAND_OUTS.wrap(manager.block_pool, self._watched_get)

    def name(self, block: int) -> int:
        """A number for the present allocation of `block`, which no other ever has."""
        return self._turn[block] * self._blocks + block

    def found_in_cache(self, request_id: str, group: int, block: int) -> bool:
        """Whether the sequence found `block` in the prefix cache when it was last admitted.

        Not if its window left the block behind and it got the same one anew.
        """
        cached = self._found.get(request_id)
        return cached is not None and self.name(block) in cached[group]

    def loaded_from_store(self, request_id: str, group: int, block: int) -> bool:
        """Whether the sequence was given `block` to be filled from a store when it was last admitted."""
        loaded = self._loaded.get(request_id)
        return loaded is not None and self.name(block) in loaded[group]

    def forget(self, request_id: str) -> None:
        self._found.pop(request_id, None)
        self._loaded.pop(request_id, None)

    def _watched_allocate(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_slots(
            request: Any,
            *args: Any,
            num_new_computed_tokens: int = 0,
            new_computed_blocks: Any = None,
            num_external_computed_tokens: int = 0,
            **kwargs: Any,
        ) -> Any:
            result = allocate(
                request,
                *args,
                num_new_computed_tokens=num_new_computed_tokens,
                new_computed_blocks=new_computed_blocks,
                num_external_computed_tokens=num_external_computed_tokens,
                **kwargs,
            )
            # Given, even if empty, only when a sequence is admitted: for the first time, or after a preemption. One
            # that waited for its blocks to be loaded is admitted again when they are there: it holds them already.
            if new_computed_blocks is not None and result is not None and not request.num_computed_tokens:
                key = request.request_id
                self._found[key] = [{self.name(b.block_id) for b in group} for group in new_computed_blocks.blocks]
                self._loaded.pop(key, None)
                if num_external_computed_tokens:
                    self._loaded[key] = self._filled(key, num_new_computed_tokens + num_external_computed_tokens)
            return result

        return allocate_slots

    def _filled(self, request_id: str, tokens: int) -> list[set[int]]:
        """By group the blocks of a sequence's first `tokens` tokens that it did not find in the prefix cache."""
        tables, sizes = self._manager.get_blocks(request_id).blocks, self._block_sizes()
        first = [table[: -(-tokens // size)] for table, size in zip(tables, sizes, strict=True)]
        names = [{self.name(b.block_id) for b in table if not b.is_null} for table in first]
        return [all_ - found for all_, found in zip(names, self._found[request_id], strict=True)]

    def _block_sizes(self) -> list[int]:
        return [manager.block_size for manager in self._manager.coordinator.single_type_managers]

    def _watched_get(self, get: Callable[[int], Any]) -> Callable[[int], Any]:
        def get_new_blocks(num_blocks: int) -> Any:
            blocks = get(num_blocks)
            for block in blocks:
                self._turn[block.block_id] += 1
            return blocks

        return get_new_blocks
