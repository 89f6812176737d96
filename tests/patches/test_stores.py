"""Copies between a pool and a store, and the fingerprint under which a store keeps blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from fraqtl_kernels.codec import pack
from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.formats import VectorFormat, get_format
from fraqtl_kernels.pages import PageLayout
from fraqtl_vllm import _vllm
from fraqtl_vllm.stores import fingerprint
from fraqtl_vllm.stores.memory import MemoryWorker

BLOCKS, CHUNKS = 40, 30
PLANES = {
    "k8v8": (1024, 2048, 2080, 2112),
    "k4v4": (512, 1024, 1056, 1088),
    "k3v3": (384, 768, 800, 832),
    "k4v2": (512, 768, 800, 928),
}
PAGES = (96, 160)  # bytes of two layers, each a group of its own


class Region:
    """In the place of vLLM's shared memory: rows of chunks, in which every tensor has its part."""

    def __init__(self, blocks_per_chunk: int) -> None:
        self.rows = torch.zeros(CHUNKS, sum(PAGES) * blocks_per_chunk + 7, dtype=torch.int8)
        self.used = 0
        self.is_open = True

    def create_next_worker_view(self, size: int) -> torch.Tensor:
        self.used += size
        return self.rows[:, self.used - size : self.used]

    def cleanup(self) -> None:
        self.is_open = False


def make_worker(blocks_per_chunk: int) -> tuple[MemoryWorker, list[torch.Tensor], Region]:
    pools = [torch.randint(-128, 128, (BLOCKS, size), dtype=torch.int8) for size in PAGES]
    refs = [[CanonicalKVCacheRef(i, size)] for i, size in enumerate(PAGES)]
    caches = CanonicalKVCaches([CanonicalKVCacheTensor(p, p.shape[1]) for p in pools], refs)
    region = Region(blocks_per_chunk)
    return MemoryWorker(caches, blocks_per_chunk, region), pools, region


@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 3])
def test_blocks_come_back_as_they_went(blocks_per_chunk: int) -> None:
    """Whole chunks go; they come back to other blocks, from the middle of the first chunk to that of the last."""
    rng = random.Random(blocks_per_chunk)
    for _ in range(20):
        worker, pools, _ = make_worker(blocks_per_chunk)
        stored = [rng.randint(0, 3) * blocks_per_chunk for _ in PAGES]
        blocks = rng.sample(range(BLOCKS), sum(stored))
        chunks = rng.sample(range(CHUNKS), sum(stored) // blocks_per_chunk)
        worker.submit_store(1, GPULoadStoreSpec(blocks, stored, [0, 0]), CPULoadStoreSpec(chunks))
        before = [pool.clone() for pool in pools]
        firsts = [rng.randint(0, count) for count in stored]
        counts = [rng.randint(0, count - first) for count, first in zip(stored, firsts, strict=True)]
        targets = rng.sample(range(BLOCKS), sum(counts))
        sources: list[int] = []
        begin = 0
        for first, count, of_group in zip(firsts, counts, stored, strict=True):
            if count:
                touched = range(first // blocks_per_chunk, (first + count - 1) // blocks_per_chunk + 1)
                sources += [chunks[begin // blocks_per_chunk + i] for i in touched]
            begin += of_group
        worker.submit_load(2, CPULoadStoreSpec(sources), GPULoadStoreSpec(targets, counts, firsts))
        at = begin = 0
        for group, (first, count) in enumerate(zip(firsts, counts, strict=True)):
            expected = before[group].clone()
            expected[targets[at : at + count]] = before[group][blocks[begin + first : begin + first + count]]
            assert torch.equal(pools[group], expected)
            at, begin = at + count, begin + stored[group]
        results = worker.get_finished()
        assert [(r.job_id, r.success) for r in results] == [(1, True), (2, True)]
        assert results[1].transfer_size == sum(n * size for n, size in zip(counts, PAGES, strict=True))
        assert worker.get_finished() == []


def test_the_memory_is_given_back() -> None:
    worker, _, region = make_worker(1)
    worker.shutdown()
    assert not region.is_open


# ---- the fingerprint


def make_rank(
    kv_format: str = "k4v4",
    dtype: torch.dtype = torch.bfloat16,
    weight: float = 1.0,
    constants: LayerConstants = IDENTITY,
    **ours: Any,
) -> Any:
    model = torch.nn.Linear(4, 4, dtype=dtype)
    torch.nn.init.constant_(model.weight, weight)
    torch.nn.init.zeros_(model.bias)

    def use_constants() -> None: ...

    kv_of = get_format(kv_format)
    impl = SimpleNamespace(
        constants=constants, kv_format=kv_of, head_size=64, num_kv_heads=2, use_constants=use_constants
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        additional_config={"fraqtl": {"kv_format": kv_format, **ours}},
        compilation_config=SimpleNamespace(static_forward_context={"layer": SimpleNamespace(impl=impl)}),
    )
    return SimpleNamespace(vllm_config=config, model_runner=SimpleNamespace(get_model=lambda: model))


def test_a_fingerprint_says_what_pages_follow_from() -> None:
    scaled = LayerConstants.of(key_scale=torch.ones(2, 64))
    ranks = [
        make_rank(),
        make_rank("k8v8"),
        make_rank("k4v4-channel", constants=scaled),
        make_rank("k4v4-channel", constants=LayerConstants.of(key_scale=torch.full((2, 64), 1.5))),
        make_rank(dtype=torch.float32),
        make_rank(weight=2.0),
        make_rank(residual=False),
        make_rank(prefill_keys="packed"),
    ]
    prints = [fingerprint.of_worker(rank) for rank in ranks]
    assert len(set(prints)) == len(ranks)
    assert fingerprint.of_worker(make_rank()) == prints[0]
    assert fingerprint.of_worker(make_rank(calibration_cache="elsewhere")) == prints[0]


def test_another_layout_needs_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages change, LAYOUT_VERSION must, too: the planes of version 2, how it packs codes, and
    what they are codes of."""
    for name, planes in PLANES.items():
        page = PageLayout(get_format(name), 64, 16)
        assert (page.v_offset, page.k_scale_offset, page.v_scale_offset, page.page_bytes) == planes
    codes = torch.arange(8)
    assert pack(codes, get_format("k4v4").k).tolist() == [64, 81, 98, 115]
    assert pack(codes, get_format("k3v3").k).tolist() == [136, 221, 170]
    assert get_format("k8v8").k == VectorFormat(8, rotated=True, calibrated=True)
    assert fingerprint.LAYOUT_VERSION == 2
    before = fingerprint.of_worker(make_rank())
    monkeypatch.setattr(fingerprint, "LAYOUT_VERSION", 3)
    assert fingerprint.of_worker(make_rank()) != before


def test_the_order_of_ranks_counts() -> None:
    assert fingerprint.of_engine(["a", "b"]) != fingerprint.of_engine(["b", "a"])
    assert fingerprint.of_engine(["a"]) != fingerprint.of_engine(["a", "a"])


class Core:
    """vLLM's engine, of which only the moment after its pools were made matters."""

    def __init__(self, ranks: list[Any]) -> None:
        self.model_executor = SimpleNamespace(collective_rpc=lambda method: [method(rank) for rank in ranks])

    def _initialize_kv_caches(self, vllm_config: Any) -> str:
        return "pool"


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_vllm, "engine_core", lambda: SimpleNamespace(EngineCore=Core))
    fingerprint.install()
    yield


@pytest.mark.parametrize("module", [None, "fraqtl_vllm.stores.spec"])
def test_the_engine_learns_it_where_a_connector_of_ours_needs_it(
    monkeypatch: pytest.MonkeyPatch, module: str | None
) -> None:
    extra = {} if module is None else {"spec_module_path": module}
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra))
    with installed(monkeypatch):
        assert Core([make_rank(), make_rank()])._initialize_kv_caches(config) == "pool"
        assert Core([])._initialize_kv_caches(SimpleNamespace(kv_transfer_config=None)) == "pool"
    one = fingerprint.of_worker(make_rank())
    assert extra.get(fingerprint.KEY) == (None if module is None else fingerprint.of_engine([one, one]))
