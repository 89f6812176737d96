"""Copies blocks between the pool and the memory of a store, where both are a CPU's. vLLM's own worker needs a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fraqtl_vllm._vllm import OffloadingWorker, TransferResult


class MemoryWorker(OffloadingWorker):
    """Copies at once, in the worker's own thread, in which no step runs meanwhile.

    A store has chunks of `blocks_per_chunk` blocks; region: vLLM's SharedOffloadRegion, which holds them.
    """

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: Any) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._pools: list[Tensor] = []  # (blocks, bytes), one for every tensor of the pool
        self._chunks: list[Tensor] = []  # (chunks, blocks of a chunk, bytes)
        for cache in kv_caches.tensors:
            view = region.create_next_worker_view(cache.page_size_bytes * blocks_per_chunk)
            self._pools.append(cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes))
            self._chunks.append(view.unflatten(1, (blocks_per_chunk, cache.page_size_bytes)))
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        began, size = time.perf_counter(), 0
        for ref, blocks, chunks, places in self._pairs(src_spec, dst_spec.block_ids):
            pages = self._pools[ref.tensor_idx][blocks, : ref.page_size_bytes]
            self._chunks[ref.tensor_idx][chunks, places, : ref.page_size_bytes] = pages
            size += pages.numel()
        return self._finish(job_id, size, began)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        began, size = time.perf_counter(), 0
        for ref, blocks, chunks, places in self._pairs(dst_spec, src_spec.block_ids):
            pages = self._chunks[ref.tensor_idx][chunks, places, : ref.page_size_bytes]
            self._pools[ref.tensor_idx][blocks, : ref.page_size_bytes] = pages
            size += pages.numel()
        return self._finish(job_id, size, began)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever left to wait for."""

    def shutdown(self) -> None:
        self._pools.clear()
        self._chunks.clear()
        self._region.cleanup()

    def _finish(self, job_id: int, size: int, began: float) -> bool:
        self._done.append(TransferResult(job_id, True, size, time.perf_counter() - began))
        return True

    def _pairs(self, pool: Any, chunk_ids: Any) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
        """(a tensor's ref, its blocks, where each lies: chunk, place in the chunk).

        pool: a GPULoadStoreSpec, whose groups of blocks lie one after the other. A group may begin and end within a
        chunk.
        """
        blocks, chunks = torch.as_tensor(pool.block_ids), torch.as_tensor(chunk_ids)
        first_block = first_chunk = 0
        for refs, size, first in zip(self._groups, pool.group_sizes, pool.block_indices, strict=True):
            if not size:
                continue
            places = torch.arange(size) + first % self._blocks_per_chunk
            of_group = chunks[first_chunk + places // self._blocks_per_chunk]
            for ref in refs:
                yield ref, blocks[first_block : first_block + size], of_group, places % self._blocks_per_chunk
            first_block += size
            first_chunk += int(places[-1]) // self._blocks_per_chunk + 1
