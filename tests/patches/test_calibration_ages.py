"""Constants that fit no longer: adapters that move keys, weights that have changed."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import IDENTITY, LayerConstants, StreamConstants
from fraqtl_kernels.formats import FORMATS
from fraqtl_vllm import _vllm
from fraqtl_vllm.calibration import adapters, weights_changed


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    group = SimpleNamespace(world_size=1, is_first_rank=True)
    for name in ("get_world_group", "get_tp_group"):
        monkeypatch.setattr(_vllm, name, lambda: group)
    for name in ("vllm", adapters.logger.name):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO, logger=adapters.logger.name)
    return caplog


def constants(key: torch.Tensor, kv_format: str = "k4v4") -> LayerConstants:
    return calibrate(FORMATS[kv_format], key, torch.ones_like(key), key)


def test_keys_that_the_constants_were_made_for_are_not_coarse() -> None:
    key = torch.randn(600, 2, 64, generator=torch.Generator().manual_seed(0))
    own = constants(key).key
    assert adapters.coarseness(key, own, own) == 1.0
    other = constants(torch.randn(600, 2, 64, generator=torch.Generator().manual_seed(1))).key
    assert adapters.coarseness(key, other, own) < 1.2


@pytest.mark.parametrize("change", ["one large channel", "another center"])
def test_keys_that_have_moved_are_coarse(change: str) -> None:
    key = torch.randn(600, 2, 64, generator=torch.Generator().manual_seed(0))
    moved = key.clone()
    moved[:, 1, 5] = moved[:, 1, 5] * 20 if change == "one large channel" else moved[:, 1, 5] + 20
    assert adapters.coarseness(moved, constants(key).key, constants(moved).key) > adapters.FAR


def test_static_steps_are_coarse_where_they_are_too_large_or_too_small() -> None:
    key = torch.randn(600, 2, 64, generator=torch.Generator().manual_seed(0))
    own = constants(key, "k4v4-channel").key
    for factor in (1 / 3, 3):
        other = constants(key * factor, "k4v4-channel").key
        assert adapters.coarseness(key, other, own) == pytest.approx(3)
    assert adapters.coarseness(key, IDENTITY.key, IDENTITY.key) == 1.0


def test_constants_in_use_on_a_cpu_beside_new_ones_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a layer of a GPU keeps them: with pretended tensors, and without the last step, the number."""
    monkeypatch.setattr(adapters, "float", lambda x: x, raising=False)
    with FakeTensorMode():
        used, own = (StreamConstants(scale=torch.ones(2, 64, device=device)) for device in ("cpu", "cuda"))
        found: Any = adapters.coarseness(torch.ones(5, 2, 64, device="cuda"), used, own)
        assert found.device.type == "cuda"


def test_what_is_said_of_an_adapter(log: pytest.LogCaptureFixture) -> None:
    adapters.tell("near", "k4v4", 1.04)
    assert "LoRA adapter near: the base model's constants fit, steps at most 1.04 times as large" in log.text
    assert [r.levelname for r in log.records] == ["INFO"]
    adapters.tell("far", "k4v4", 3.0)
    assert "LoRA adapter far moves keys or values far: k4v4 stores them up to 3.0 times as coarsely" in log.text
    assert [r.levelname for r in log.records] == ["INFO", "WARNING"]
    assert log.text.rstrip().endswith("Merge it into the model, or choose --kv-format k8v8")
    adapters.tell("far", "k8v8", 3.0)
    assert log.text.rstrip().endswith("Merge it into the model")


def test_adapters_are_measured_when_they_are_new(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(adapters, "measure", lambda worker, request: measured.append(request.lora_name) or 1.0)
    loaded: set[int] = set()
    runner = SimpleNamespace(
        list_loras=lambda: set(loaded), add_lora=lambda request: not loaded.add(request.lora_int_id)
    )
    config = SimpleNamespace(
        lora_config=object(),
        additional_config={},
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(data_parallel_size=1),
    )
    worker: Any = SimpleNamespace(vllm_config=config, model_runner=runner)
    adapters.watch(worker)
    for name, number, in_place in (("a", 1, False), ("a", 1, False), ("b", 2, False), ("a", 1, True)):
        assert runner.add_lora(SimpleNamespace(lora_name=name, lora_int_id=number, load_inplace=in_place))
    assert measured == ["a", "b", "a"]


@pytest.mark.parametrize("change", ["reload_weights", "finish_weight_update"])
def test_new_weights_make_old_constants(change: str, log: pytest.LogCaptureFixture) -> None:
    weights = ["as calibrated"]
    worker: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config={}, cache_config=SimpleNamespace(cache_dtype="auto")),
        reload_weights=lambda *new: weights.__setitem__(slice(None), new),
        finish_weight_update=lambda *new: weights.__setitem__(slice(None), new),
    )
    weights_changed.watch(worker, lambda: weights[0])
    getattr(worker, change)("as calibrated")
    assert log.text == ""
    getattr(worker, change)("others")
    assert "The weights have changed, and the constants of the KV cache are those of the old ones: k4v4" in log.text
