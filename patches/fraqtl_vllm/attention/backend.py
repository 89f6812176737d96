"""The attention backend `FRAQTL`: vLLM's paged pool holds packed pages, and attention reads them.

What is the same on every device stands here; the work is done by a device half, `cpu.py` or
`cuda.py`, which extends `layer.FraqtlImpl` and builds its own metadata.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, MultipleOf

from fraqtl_kernels.formats import CPU_HEAD_SIZES, DEFAULT_FORMAT, FORMATS, KVFormat, get_format
from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE
from fraqtl_vllm import hybrids
from fraqtl_vllm._vllm import AttentionSpec, KVCacheLayout, KVQuantMode, get_current_vllm_config_or_none
from fraqtl_vllm.checkpoint import FP8_CACHES
from fraqtl_vllm.config import settings_of
from fraqtl_vllm.names import BACKEND_NAME, cache_dtype_of
from fraqtl_vllm.support import PLAIN_DTYPES

if TYPE_CHECKING:
    from fraqtl_vllm.attention.layer import FraqtlImpl


def device_half() -> ModuleType:
    """The module whose `Impl` and `MetadataBuilder` work on this process's platform."""
    return import_module("fraqtl_vllm.attention.cpu" if current_platform.is_cpu() else "fraqtl_vllm.attention.cuda")


class FraqtlBackend(AttentionBackend):
    """Tells vLLM what the packed cache needs: bytes per token, layout, and which classes do the work."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        *PLAIN_DTYPES,
        *FP8_CACHES,
        *map(cache_dtype_of, FORMATS),
    ]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[FraqtlImpl[Any]]:
        return device_half().Impl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return device_half().MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Not the 128 of CPUs, which would make prefixes coarser and waste more of a sequence's last block."""
        return BLOCK_SIZE_MULTIPLE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(CPU_HEAD_SIZES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """A checkpoint may have them: nothing here reads them."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # [H, N, C] contiguous in a block: the inside of a head's page is ours to arrange.
        config = get_current_vllm_config_or_none()
        is_hybrid = config is not None and hybrids.are_interleaved(config)
        return (KVCacheLayout[hybrids.LAYOUT if is_hybrid else hybrids.PLAIN_LAYOUT],)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        content = _kv_format().bytes_per_token(spec.head_size)
        # vLLM's own quantization is none: a checkpoint may have asked for it.
        return replace(spec, dtype=torch.uint8, state_content_bytes=content, kv_quant_mode=KVQuantMode.NONE)


def _kv_format() -> KVFormat:
    """That of vLLM's current configuration, which it has wherever specs come from layers (`hooks.SPECS`).

    Elsewhere vLLM only estimates, for caches of several dtypes, which `support` refuses: there any format will do.
    """
    config = get_current_vllm_config_or_none()
    return get_format(DEFAULT_FORMAT) if config is None else settings_of(config).format
