"""Which blocks of a request came from the prefix cache, and which allocation of a block it is.

vLLM's block tables don't say either. A block's number is not enough to tell whether two sequences of a
request shared it: the second may have got it after the first had given it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fraqtl_vllm import compat


class Allocations:
    """Watches a KV-cache manager: one step more for every allocation, nothing of it is changed."""

    def __init__(self, manager: Any) -> None:
        self._blocks = len(manager.block_pool.blocks)
        self._turn = [0] * self._blocks  # by block: how often it was handed out
        self._found: dict[str, list[set[int]]] = {}  # by sequence and group: names of blocks from the prefix cache
        compat.ADMISSIONS.wrap(manager, self._watched_allocate)
        compat.HAND_OUTS.wrap(manager.block_pool, self._watched_get)

    def name(self, block: int) -> int:
        """A number for the present allocation of `block`, which no other ever has."""
        return self._turn[block] * self._blocks + block

    def found_in_cache(self, request_id: str, group: int, block: int) -> bool:
        """Whether the sequence found `block` in the prefix cache when it was last admitted.

        Not if its window left the block behind and it got the same one anew.
        """
        cached = self._found.get(request_id)
        return cached is not None and self.name(block) in cached[group]

    def forget(self, request_id: str) -> None:
        self._found.pop(request_id, None)

    def _watched_allocate(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_slots(request: Any, *args: Any, new_computed_blocks: Any = None, **kwargs: Any) -> Any:
            result = allocate(request, *args, new_computed_blocks=new_computed_blocks, **kwargs)
            # Given, even if empty, only when a sequence is admitted: for the first time, or after a preemption.
            if new_computed_blocks is not None and result is not None:
                self._found[request.request_id] = [
                    {self.name(b.block_id) for b in group} for group in new_computed_blocks.blocks
                ]
            return result

        return allocate_slots

    def _watched_get(self, get: Callable[[int], Any]) -> Callable[[int], Any]:
        def get_new_blocks(num_blocks: int) -> Any:
            blocks = get(num_blocks)
            for block in blocks:
                self._turn[block.block_id] += 1
            return blocks

        return get_new_blocks
