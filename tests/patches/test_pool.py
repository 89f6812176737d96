"""How the numbers of a pool get from the engine that plans it to the HTTP server; what they are: test_planner.py."""

from __future__ import annotations

import pickle
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fraqtl_vllm.accounting import pool
from tests.patches.test_scheduler import FULL
from tests.patches.test_scheduler import pool as make_config


def test_a_worker_says_what_was_noted_when_the_pool_was_planned() -> None:
    config = make_config((FULL, 3))
    setattr(config, pool.NOTE, {"blocks": 100, "tokens": 1600})
    for copied in (deepcopy(config), pickle.loads(pickle.dumps(config))):  # by the runner, by the way to its process
        copied.kv_cache_groups[0].layer_names.append("a layer that shares another's cache")  # as vLLM's runner does
        worker = SimpleNamespace(model_runner=SimpleNamespace(kv_cache_config=copied))
        assert pool.kv_pool(worker) == {"blocks": 100, "tokens": 1600}


def test_every_worker_has_the_method_and_every_engine_plans_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import core
    from vllm.v1.worker.worker_base import WorkerBase

    seen: list[Any] = []
    monkeypatch.delattr(WorkerBase, pool.METHOD, raising=False)
    planned = make_config((FULL, 3))
    monkeypatch.setattr(core, "get_kv_cache_configs", lambda *arguments: seen.append(arguments) or [planned])
    pool.install()
    pool.install()  # twice is once
    assert getattr(WorkerBase, pool.METHOD) is pool.kv_pool
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=None), model_config=SimpleNamespace(dtype=torch.bfloat16)
    )
    assert core.get_kv_cache_configs(config, [{}], [1]) == [planned]
    assert seen == [(config, [{}], [1])]
    sizes = {"block_bytes": [3 * 2176], "baseline_block_bytes": [3 * 8192], "state_block_bytes": [0]}
    assert getattr(deepcopy(planned), pool.GROUP_NOTE) == sizes  # which vLLM hands to the scheduler
    assert not hasattr(planned, pool.NOTE)  # of another backend's pool there is nothing to say
