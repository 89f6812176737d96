"""Under which names vLLM finds our backend and our platforms."""

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
