"""Under which names vLLM finds our backend, our platforms and our formats."""

from __future__ import annotations

BACKEND_NAME = "FRAQTL"
BACKEND_CLASS = "fraqtl_vllm.attention.backend.FraqtlBackend"

WITHOUT_NATIVE_OPS = "fraqtl_vllm.platform.cpu_platform.CpuWithoutNativeOps"
GPT_OSS_WEIGHTS = "gpt_oss_mxfp4"
"""What vLLM calls the quantization of gpt-oss, whose experts are in MXFP4."""
IN_PLACE_OF = {
    "vllm.platforms.cpu.CpuPlatform": "fraqtl_vllm.platform.native_cpu_platform.NativeCpu",
    "vllm.platforms.zen_cpu.ZenCpuPlatform": "fraqtl_vllm.platform.native_cpu_platform.NativeZenCpu",
}
"""Our platforms, by those of vLLM that would log at most that they can't use our backend, and serve another cache."""

CACHE_DTYPE_PREFIX = "fraqtl_"
"""Of the names that `--kv-cache-dtype` has for our formats, since vLLM 0.33."""


def cache_dtype_of(kv_format: str) -> str:
    return CACHE_DTYPE_PREFIX + kv_format


def format_of(cache_dtype: str) -> str | None:
    """The format that a `--kv-cache-dtype` names, or None if it is one of vLLM's own."""
    return cache_dtype.removeprefix(CACHE_DTYPE_PREFIX) if cache_dtype.startswith(CACHE_DTYPE_PREFIX) else None
