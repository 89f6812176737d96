"""The attention backend `FRAQTL`: vLLM's paged pool holds packed pages, and attention reads them.

The format is read where vLLM builds a layer (there is a current configuration then) and kept
for `customize_spec`, which vLLM calls later, in the same process, without one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from fraqtl_kernels import cpu
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import DEFAULT_FORMAT, HEAD_SIZES, KVFormat, check_head_size, get_format
from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE, PageLayout
from fraqtl_vllm._vllm import AttentionSpec, KVCacheLayout, get_current_vllm_config
from fraqtl_vllm.config import read_config
from fraqtl_vllm.plugin import BACKEND_NAME
from fraqtl_vllm.support import check_supported


class FraqtlBackend(AttentionBackend):
    """Tells vLLM what the packed cache needs: bytes per token, layout, and which classes do the work."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    kv_format: ClassVar[KVFormat] = get_format(DEFAULT_FORMAT)

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[FraqtlImpl]:
        return FraqtlImpl

    @staticmethod
    def get_builder_cls() -> type[FraqtlMetadataBuilder]:
        return FraqtlMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # [H, N, C] contiguous in a block: the inside of a head's page is ours to arrange.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.kv_format.bytes_per_token(spec.head_size))


@dataclass
class FraqtlMetadata(AttentionMetadata):
    """One step's batch, shared by all layers of a KV-cache group."""

    block_table: Tensor
    plan: cpu.AttentionPlan


class FraqtlMetadataBuilder(AttentionMetadataBuilder[FraqtlMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FraqtlMetadata:
        batch = common_attn_metadata
        plan = cpu.plan_attention(batch.query_start_loc.tolist(), batch.seq_lens.tolist())
        return FraqtlMetadata(batch.block_table_tensor, plan)


class FraqtlImpl(AttentionImpl[FraqtlMetadata]):
    """One layer's write and attention. The keys of the running chunk are read back from their pages
    like all others, so that chunking, prefix hits and preemption can't change what is attended."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        config = get_current_vllm_config()
        check_supported(config)
        check_head_size(head_size)
        if alibi_slopes is not None:
            raise UnsupportedError("the packed KV cache does not support ALiBi models")
        if sinks is not None:
            raise UnsupportedError("the packed KV cache does not support attention sinks yet")
        if attn_type != AttentionType.DECODER:
            raise UnsupportedError(
                f"the packed KV cache does not support {AttentionType(attn_type).value} attention, only decoders"
            )
        if config.device_config.device_type != "cpu":
            raise UnsupportedError("this version attends packed blocks on the CPU only; its GPU kernels are to come")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.soft_cap = logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        cpu.warm_up()
        self.kv_format = FraqtlBackend.kv_format = read_config(config.additional_config).format

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if kv_cache.numel():
            cpu.write(kv_cache, self._layout(kv_cache), key, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FraqtlMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # profiling run: no cache exists yet
            return output.fill_(0)
        cpu.attend(
            query,
            kv_cache,
            self._layout(kv_cache),
            attn_metadata.block_table,
            attn_metadata.plan,
            output,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.soft_cap,
        )
        return output

    def _layout(self, kv_cache: Tensor) -> PageLayout:
        return PageLayout(self.kv_format, self.head_size, kv_cache.shape[2])
