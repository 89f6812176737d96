"""vLLM's CPU builds, which have compiled operators: our backend on their platform, where it is asked for.

Where it isn't, everything is vLLM's own. Where it is, attention, cache, block size and worker are ours; custom_ops,
torch.compile, executor, slot mapping, sampling and all operators stay as vLLM chooses them.
"""

from __future__ import annotations

from typing import Any

from fraqtl_vllm import _vllm
from fraqtl_vllm._vllm import ZenCpuPlatform
from fraqtl_vllm.names import BACKEND_CLASS, BACKEND_NAME
from fraqtl_vllm.platform.packed_cpu import PackedCpu
from fraqtl_vllm.support import asks_for_packed_cache, check_backend_is_chosen, choose_backend


class NativeCpu(PackedCpu):
    """In place of vLLM's `CpuPlatform`."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not None and selected_backend.name == BACKEND_NAME:
            return BACKEND_CLASS
        path: str = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        return path

    @classmethod
    def check_and_update_config(cls, vllm_config: _vllm.VllmConfig) -> None:
        choose_backend(vllm_config)
        super().check_and_update_config(vllm_config)
        if asks_for_packed_cache(vllm_config):
            check_backend_is_chosen(vllm_config)
            cls.configure_packed(vllm_config)


class NativeZenCpu(NativeCpu, ZenCpuPlatform):
    """In place of vLLM's `ZenCpuPlatform`."""
