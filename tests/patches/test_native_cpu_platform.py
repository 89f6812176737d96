"""Our platform on a CPU build of vLLM. Its classes need none; serving there is checked by tests/vllm_cpu."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CacheConfig, CompilationConfig, ParallelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import plugin
from fraqtl_vllm._vllm import VERSION
from fraqtl_vllm.platform.native_cpu_platform import NativeCpu, NativeZenCpu
from fraqtl_vllm.platform.packed_cpu import STOCK_WORKER, WORKER, PackedCpu

on_cpu_only = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on another platform here")
OURS = "fraqtl_vllm.attention.backend.FraqtlBackend"
STOCK = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def configured(platform: type[CpuPlatform], backend: str | None, **options: Any) -> VllmConfig:
    """vLLM's defaults, as `platform` changes them."""
    config = VllmConfig()
    # As they were before this machine's own platform changed them.
    config.cache_config = CacheConfig(**options.pop("cache", {}))
    config.parallel_config, config.compilation_config = ParallelConfig(), CompilationConfig()
    config.attention_config.backend = None if backend is None else AttentionBackendEnum[backend]
    for name, value in options.items():
        setattr(config, name, value)
    platform.check_and_update_config(config)
    return config


def facts(config: VllmConfig) -> tuple[Any, ...]:
    return (
        config.cache_config.block_size,
        config.parallel_config.worker_cls,
        config.parallel_config.distributed_executor_backend,
        config.attention_config.backend,
        config.compilation_config.custom_ops,
        config.compilation_config.mode,
    )


def choose(platform: type[CpuPlatform], backend: str | None, **selector: Any) -> str:
    selected = None if backend is None else AttentionBackendEnum[backend]
    layer = SimpleNamespace(
        **{"has_sink": False, "use_sparse": False, "use_mla": False, "kv_cache_dtype": "auto", **selector}
    )
    path: str = platform.get_attn_backend_cls(selected, layer)
    return path


@on_cpu_only
@pytest.mark.parametrize("platform", [NativeCpu, NativeZenCpu])
@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_nothing_changes_where_it_is_not_asked_for(platform: type[CpuPlatform], backend: str | None) -> None:
    assert facts(configured(platform, backend)) == facts(configured(CpuPlatform, backend))
    # vLLM 0.33 chooses later, when it knows the layers.
    assert configured(platform, backend).cache_config.block_size == (128 if VERSION == "0.32" else 16)
    assert choose(platform, backend) == choose(CpuPlatform, backend) == STOCK


@on_cpu_only
def test_what_is_ours_where_it_is_asked_for() -> None:
    config, stock = configured(NativeCpu, "FRAQTL"), configured(CpuPlatform, "FRAQTL")
    assert stock.parallel_config.worker_cls == STOCK_WORKER
    assert config.cache_config.block_size == 16
    assert config.parallel_config.worker_cls == WORKER
    # Operators, compilation and executor stay as vLLM chooses them.
    assert facts(config)[2:] == facts(stock)[2:]
    assert choose(NativeCpu, "FRAQTL") == OURS
    assert choose(CpuPlatform, "FRAQTL") == STOCK  # what it would be without us


@on_cpu_only
def test_a_block_size_of_the_users_own() -> None:
    assert configured(NativeCpu, "FRAQTL", cache={"block_size": 64}).cache_config.block_size == 64
    with pytest.raises(UnsupportedError, match=r"--block-size 40: it must be a multiple of 16$"):
        configured(NativeCpu, "FRAQTL", cache={"block_size": 40})


@on_cpu_only
def test_settings_without_the_backend_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no attention backend: add --attention-backend FRAQTL$"):
        configured(NativeCpu, None, additional_config={"fraqtl": {"kv_format": "k8v8"}})
    with pytest.raises(UnsupportedError, match=r"attention backend CPU_ATTN: add --attention-backend FRAQTL$"):
        configured(NativeCpu, "CPU_ATTN", additional_config={"fraqtl": {}})


def test_zen_stays_zen() -> None:
    assert NativeZenCpu().is_zen_cpu()
    assert not NativeCpu().is_zen_cpu()
    assert issubclass(NativeZenCpu, PackedCpu)
    assert choose(NativeZenCpu, "FRAQTL") == OURS
