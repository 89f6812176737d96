from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CacheConfig
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import plugin
from fraqtl_vllm.platform import stock_cpu
from fraqtl_vllm.platform.native_cpu_platform import NativeCpu

plugin.register()


def config(backend: str | None) -> Any:
    chosen = None if backend is None else AttentionBackendEnum[backend]
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=chosen, backend_per_kind={}),
        cache_config=CacheConfig(),
        additional_config={},
        seen=[],
    )


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> type[CpuPlatform]:
    """vLLM's class in the place of the process's platform, with its work on a configuration noted only."""
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(lambda given: given.seen.append("vLLM")))
    monkeypatch.setattr(stock_cpu, "current_platform", CpuPlatform())
    return CpuPlatform


def test_the_stock_platform_refuses_our_backend(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    stock_cpu.install()
    stock_cpu.install()
    with pytest.raises(
        UnsupportedError, match=r"^vLLM's platform CpuPlatform does not offer FRAQTL: unset VLLM_TARGET"
    ):
        stock.check_and_update_config(config("FRAQTL"))


@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_the_stock_platform_serves_its_own_as_ever(stock: Any, backend: str | None) -> None:
    stock_cpu.install()
    stock_cpu.install()
    given = config(backend)
    stock.check_and_update_config(given)
    assert given.seen == ["vLLM"]


def test_our_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_cpu, "current_platform", NativeCpu())
    before = NativeCpu.__dict__["check_and_update_config"]
    stock_cpu.install()
    assert NativeCpu.__dict__["check_and_update_config"] is before
