from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CacheConfig

from fraqtl_vllm._vllm import CPUWorker
from fraqtl_vllm.platform.cpu_worker import FraqtlCpuWorker, generators_put_aside


def runner_with(generators: dict[int, Any], unfinished: list[bool]) -> Any:
    mask = np.array([*unfinished, True, True])  # rows past the batch are left over from another step
    batch = SimpleNamespace(generators=generators, num_reqs=len(unfinished))
    return SimpleNamespace(input_batch=batch, discard_request_mask=SimpleNamespace(np=mask))


def test_unfinished_prompts_lend_no_generator() -> None:
    generators = {row: torch.Generator().manual_seed(row) for row in (0, 2, 3)}
    before = dict(generators)
    runner = runner_with(generators, [True, True, False, True])
    with generators_put_aside(runner):
        assert generators == {2: before[2]}
        torch.randint(9, (1,), generator=generators[2])
    assert generators == before
    fresh = {row: torch.Generator().manual_seed(row).get_state() for row in before}
    assert [row for row in before if not torch.equal(before[row].get_state(), fresh[row])] == [2]


def test_generators_come_back_when_a_step_fails() -> None:
    generators = {0: torch.Generator()}
    with pytest.raises(ValueError, match="boom"), generators_put_aside(runner_with(generators, [True])):
        raise ValueError("boom")
    assert list(generators) == [0]


def test_generators_of_the_cpu_still_cannot_be_turned_back() -> None:
    """If they can one day, this worker has nothing left to do."""
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()


@pytest.mark.parametrize("change", ["reload_weights", "finish_weight_update"])
def test_new_weights_reach_layers_that_keep_a_copy(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    layer.cpu_linear = None
    worker = FraqtlCpuWorker.__new__(FraqtlCpuWorker)
    worker.vllm_config = SimpleNamespace(
        additional_config={"fraqtl": {"cpu_weight_copies": True}},
        model_config=SimpleNamespace(quantization=None, is_hybrid=False),
        cache_config=CacheConfig(),
    )
    worker.model_runner = SimpleNamespace(get_model=lambda: layer)
    monkeypatch.setattr(CPUWorker, "load_model", lambda _: None)
    monkeypatch.setattr(CPUWorker, change, lambda _: layer.weight.data.copy_(torch.randn(96, 64)))
    worker.load_model()
    getattr(worker, change)()
    x = torch.randn(5, 64).bfloat16()
    with torch.inference_mode():
        expected = torch.nn.functional.linear(x, layer.weight)
        torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), expected, rtol=1e-2, atol=1e-2)
