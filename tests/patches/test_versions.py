"""Which vLLM works, what is said of another, and the names that 0.33 has for our formats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from vllm.config import CacheConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.formats import FORMATS
from fraqtl_vllm import compat, plugin
from fraqtl_vllm._vllm import VERSION, check_version
from fraqtl_vllm.attention.backend import FraqtlBackend
from fraqtl_vllm.config import read_config, settings_of
from fraqtl_vllm.names import cache_dtype_of, format_of
from fraqtl_vllm.platform import cuda

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.smoke
has_names = pytest.mark.skipif(VERSION == "0.32", reason="vLLM 0.32 has no place for names of cache dtypes")
on_cpu_only = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on another platform here")


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register()


# ---- versions


def sentence(version: str) -> str:
    return f"fraqtl-serve works with vLLM 0.32.x and 0.33.x, but {version} is installed: pip install 'vllm==0.32.0'"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4", "0.33.0", "0.33.1+cpu", "0.33.0rc1"])
def test_versions_that_work(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "0.3.3", "1.33.0", "0.330.0"])
def test_versions_that_do_not(version: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        check_version(version)
    assert str(refused.value) == sentence(version)


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("-m", "fraqtl_serve", "serve", "--quiet"), 2),
        (("-m", "fraqtl_serve", "doctor"), 1),
        (("-c", "from fraqtl_vllm import plugin; plugin.register()"), 1),  # what vLLM does, and passes on
    ],
)
def test_another_vllm_is_refused(tmp_path: Path, version: str, command: tuple[str, ...], status: int) -> None:
    """Before anything is imported that it may have elsewhere: this one has nothing but its version."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(f'__version__ = "{version}"\n')
    info = tmp_path / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status
    said = [line for line in done.stderr.splitlines() if sentence(version) in line]
    assert len(said) == 1, done.stderr


def test_the_default_is_one_that_works() -> None:
    assert compat.not_supported(compat.DEFAULT_VERSION) is None
    assert VERSION in compat.SUPPORTED_VERSIONS


# ---- names of formats


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_leads_back_to_its_format(name: str) -> None:
    assert format_of(cache_dtype_of(name)) == name
    assert cache_dtype_of(name) in FraqtlBackend.supported_kv_cache_dtypes


@pytest.mark.parametrize("dtype", ["auto", "fp8", "bfloat16", "int4_per_token_head"])
def test_vllms_own_names_are_no_formats(dtype: str) -> None:
    assert format_of(dtype) is None


@has_names
@pytest.mark.parametrize("name", FORMATS)
def test_vllm_takes_the_name_of_every_format(name: str) -> None:
    import torch
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

    plugin.register()  # twice is once
    dtype = cache_dtype_of(name)
    assert CacheConfig(cache_dtype=dtype).cache_dtype == dtype
    assert STR_DTYPE_TO_TORCH_DTYPE[dtype] is torch.uint8
    assert get_kv_quant_mode(dtype) is KVQuantMode.NONE  # no kernel of vLLM's takes the pages for its own


def test_vllm_refuses_other_names() -> None:
    with pytest.raises(ValidationError, match="fraqtl_int3"):
        CacheConfig(cache_dtype="fraqtl_int3")  # type: ignore[arg-type]


def test_the_settings_have_the_named_format() -> None:
    assert read_config({}, "fraqtl_k8v8").kv_format == "k8v8"
    assert read_config({"fraqtl": {"residual": False}}, "fraqtl_k8v8").kv_format == "k8v8"
    assert read_config({"fraqtl": {"kv_format": "k8v8"}}, "fraqtl_k8v8").kv_format == "k8v8"
    assert read_config({"fraqtl": {"kv_format": "k8v8"}}, "bfloat16").kv_format == "k8v8"
    assert read_config({}, "auto").kv_format == "k4v4"


def test_two_formats_contradict_each_other() -> None:
    with pytest.raises(ConfigError) as refused:
        read_config({"fraqtl": {"kv_format": "k4v4"}}, "fraqtl_k8v8")
    assert str(refused.value) == (
        "--kv-cache-dtype fraqtl_k8v8 contradicts KV format k4v4, which --kv-format or --additional-config says: "
        "give one of them"
    )


def configured(cache_dtype: Any, backend: str | None) -> VllmConfig:
    """vLLM's defaults, as this machine's platform changes them."""
    config = VllmConfig()
    config.cache_config = CacheConfig(cache_dtype=cache_dtype)
    config.attention_config.backend = None if backend is None else AttentionBackendEnum[backend]
    type(current_platform).check_and_update_config(config)
    return config


@has_names
@on_cpu_only
@pytest.mark.parametrize("backend", [None, "FRAQTL"])
def test_the_name_of_a_format_chooses_our_backend(backend: str | None) -> None:
    config = configured("fraqtl_k8v8", backend)
    assert config.attention_config.backend is AttentionBackendEnum["FRAQTL"]
    assert settings_of(config).kv_format == "k8v8"
    assert config.cache_config.block_size == 16


CONTRADICTION = (
    r"^--kv-cache-dtype fraqtl_k8v8 needs --attention-backend FRAQTL, and CPU_ATTN was chosen: "
    r"leave --attention-backend out$"
)


@has_names
@on_cpu_only
def test_another_backend_contradicts_the_name_of_a_format() -> None:
    with pytest.raises(UnsupportedError, match=CONTRADICTION):
        configured("fraqtl_k8v8", "CPU_ATTN")


class Gpu(Platform):
    """A platform of vLLM's for CUDA, which knows nothing of us."""

    _enum = PlatformEnum.CUDA


@has_names
def test_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = type("Gpu", (Gpu,), {})
    monkeypatch.setattr(cuda, "current_platform", gpu())
    cuda.install()
    cuda.install()
    config = VllmConfig()
    config.cache_config = CacheConfig(cache_dtype="fraqtl_k8v8")  # type: ignore[arg-type]
    config.attention_config.backend = None
    gpu.check_and_update_config(config)
    assert config.attention_config.backend is AttentionBackendEnum["FRAQTL"]
    config.attention_config.backend = AttentionBackendEnum["CPU_ATTN"]
    with pytest.raises(UnsupportedError, match=CONTRADICTION):
        gpu.check_and_update_config(config)
    config.cache_config = CacheConfig()
    gpu.check_and_update_config(config)
    assert config.attention_config.backend is AttentionBackendEnum["CPU_ATTN"]


def test_layers_that_draft_have_our_backend_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM doesn't hand them that of the model."""
    gpu: Any = type("Gpu", (Gpu,), {})
    monkeypatch.setattr(cuda, "current_platform", gpu())
    cuda.install()
    config: Any = VllmConfig()
    config.speculative_config = asked = SimpleNamespace(attention_backend=None)
    config.attention_config.backend = AttentionBackendEnum["CPU_ATTN"]
    gpu.check_and_update_config(config)
    assert asked.attention_backend is None
    config.attention_config.backend = AttentionBackendEnum["FRAQTL"]
    for _ in range(2):
        gpu.check_and_update_config(config)
        assert asked.attention_backend is AttentionBackendEnum["FRAQTL"]
    asked.attention_backend = AttentionBackendEnum["CPU_ATTN"]
    with pytest.raises(UnsupportedError, match=r'--speculative-config has CPU_ATTN for those that draft: leave "atten'):
        gpu.check_and_update_config(config)


def test_other_platforms_are_left_alone() -> None:
    before = Gpu.__dict__.get("check_and_update_config"), type(current_platform).check_and_update_config
    cuda.install()
    assert before == (Gpu.__dict__.get("check_and_update_config"), type(current_platform).check_and_update_config)
