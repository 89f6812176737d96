"""The CPU half of the backend: compiled kernels over the pages, for prefill and decode alike.

The keys of the running chunk are read back from their pages like all others, and its refinements are what the pages
would hold, so that chunking, prefix hits and preemption can't change what is attended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from fraqtl_kernels import cpu
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import progress
from fraqtl_vllm._vllm import get_current_vllm_config, get_forward_context
from fraqtl_vllm.config import read_config
from fraqtl_vllm.layer import FraqtlImpl

_SHARED: set[str] = set()  # names of layers whose pages other layers read, too


@dataclass
class Metadata(AttentionMetadata):
    """One step's batch, shared by all layers of a KV-cache group."""

    block_table: Tensor
    plan: cpu.AttentionPlan


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Plans a step on the host; there are no CUDA graphs here."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        batch = common_attn_metadata
        plan = cpu.plan_attention(batch.query_start_loc.tolist(), batch.seq_lens.tolist())
        return Metadata(batch.block_table_tensor, plan)


class Impl(FraqtlImpl[Metadata]):
    """One layer's write and attention on the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if read_config(get_current_vllm_config().additional_config).prefill_keys == "raw":
            raise UnsupportedError("prefill_keys 'raw' needs a GPU: on the CPU choose 'packed' or leave it out")
        with progress.if_slow("compiling the kernels for this processor, once, in about half a minute"):
            cpu.warm_up()
        self.refinements: cpu.Refinements | None = None  # of the running batch, between write and attention
        if self.kv_sharing_target_layer_name is not None:
            _SHARED.add(self.kv_sharing_target_layer_name)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if kv_cache.numel():
            layout = self.layout(kv_cache)
            self.refinements = cpu.write(kv_cache, layout, key, value, slot_mapping, self.constants)

    def _take_refinements(self, layer: Any) -> cpu.Refinements | None:
        """What this layer's pages were last given, or those that it shares; forgotten where no other layer asks."""
        if self.kv_sharing_target_layer_name is not None:
            layer = get_forward_context().no_compile_layers[self.kv_sharing_target_layer_name]
        found: cpu.Refinements | None = layer.impl.refinements
        if layer.layer_name not in _SHARED:
            layer.impl.refinements = None
        return found

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:
            return self.attend_without_cache(layer, query, key, value, output)
        cpu.attend(
            query,
            kv_cache,
            self.layout(kv_cache),
            attn_metadata.block_table,
            attn_metadata.plan,
            output,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.soft_cap,
            constants=self.constants,
            refinements=self._take_refinements(layer),
        )
        return output
