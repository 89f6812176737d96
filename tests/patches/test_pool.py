from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fraqtl_vllm import pool
from tests.patches.test_scheduler import FULL, PADDED, WINDOW
from tests.patches.test_scheduler import pool as make_config


def worker(*groups: tuple[Any, int]) -> Any:
    return SimpleNamespace(
        model_runner=SimpleNamespace(kv_cache_config=make_config(*groups)),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )


def test_pool_of_one_rank() -> None:
    assert pool.kv_pool(worker((FULL, 3))) == {
        "blocks": 100,
        "block_size": [16],
        "block_bytes": [6528],  # 3 layers · 2 heads · 16 tokens · 68 bytes
        "baseline_block_bytes": [24576],
    }


def test_pool_of_several_groups() -> None:
    said = pool.kv_pool(worker((PADDED, 1), (WINDOW, 2)))
    assert said["block_size"] == [16, 32]
    assert said["block_bytes"] == [4096, 2 * 4352]
    assert said["baseline_block_bytes"] == [8192, 2 * 16384]


def test_every_worker_has_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    monkeypatch.delattr(WorkerBase, pool.METHOD, raising=False)
    pool.install()
    assert getattr(WorkerBase, pool.METHOD) is pool.kv_pool
