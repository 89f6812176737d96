"""The CPU half of the backend: compiled kernels over the pages, for prefill and decode alike.

Where every request has one new token, a layer's write and attention are one compiled call. So vLLM's call to write
only notes what is to be written, and `forward`, which follows it, does both.

The keys of the running chunk are read back from their pages like all others, and its residuals are what the pages
would hold, so that chunking, prefix hits and preemption can't change what is attended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from fraqtl_kernels import cpu
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.pages import PageLayout
from fraqtl_vllm._vllm import get_forward_context
from fraqtl_vllm.attention.layer import FraqtlImpl
from fraqtl_vllm.start import progress

_SHARED: set[str] = set()  # names of layers whose pages other layers read, too


@dataclass
class Metadata(AttentionMetadata):
    """One step's batch, shared by all layers of a KV-cache group."""

    block_table: Tensor
    plan: cpu.AttentionPlan
    prompts: cpu.AttentionPlan
    """The part of the plan that is left when `step` is done."""
    step: cpu.StepPlan | None
    """The requests with one new token, if there are any."""


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Plans a step on the host; there are no CUDA graphs here."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        batch = common_attn_metadata
        plan = cpu.plan_attention(batch.query_start_loc.tolist(), batch.seq_lens.tolist())
        return Metadata(batch.block_table_tensor, plan, plan.prompts, _plan_step(batch))


def _plan_step(batch: CommonAttentionMetadata) -> cpu.StepPlan | None:
    if batch.max_query_len == 1:
        return cpu.StepPlan(batch.seq_lens, batch.block_table_tensor, batch.slot_mapping)
    single = batch.query_start_loc.diff() == 1
    if not bool(single.any()):
        return None
    rows = batch.query_start_loc[:-1][single].long()
    return cpu.StepPlan(batch.seq_lens[single], batch.block_table_tensor[single], batch.slot_mapping, rows)


class Impl(FraqtlImpl[Metadata]):
    """One layer's write and attention on the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.settings.prefill_keys == "raw":
            raise UnsupportedError("prefill_keys 'raw' needs a GPU: on the CPU choose 'packed' or leave it out")
        with progress.if_slow("compiling the kernels for this processor, once, in about half a minute"):
            for each in self.settings.formats:
                cpu.warm_up(each, torch.get_default_dtype())  # vLLM builds a model under its dtype
        self.residuals: cpu.Residuals | None = None  # of the running batch, between write and attention
        self._unwritten: tuple[Tensor, Tensor, Tensor] | None = None
        self._operands: cpu.LayerOperands | None = None
        self._step: cpu.DecodeStep | None = None
        if self.kv_sharing_target_layer_name is not None:
            _SHARED.add(self.kv_sharing_target_layer_name)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if kv_cache.numel():
            self._unwritten = key, value, slot_mapping

    def use_constants(self, constants: LayerConstants) -> None:
        super().use_constants(constants)
        self._operands = self._step = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self._step = None  # it has a copy of the sinks

    def _operands_of(self, layout: PageLayout) -> cpu.LayerOperands:
        """Made when they are first asked for: pages are known later than constants."""
        if self._operands is None:
            self._operands = cpu.LayerOperands.of(layout, self.num_kv_heads, self.constants)
        return self._operands

    def _write(self, kv_cache: Tensor, slots: Tensor | None = None) -> None:
        """What was noted, to `slots` instead of those that came with it."""
        if self._unwritten is not None:
            key, value, noted = self._unwritten
            slot_mapping = noted if slots is None else slots
            layout = self.layout(kv_cache)
            self.residuals = cpu.write(kv_cache, layout, key, value, slot_mapping, self._operands_of(layout))
            self._unwritten = None

    def _decode(self, query: Tensor, kv_cache: Tensor, plan: cpu.StepPlan, output: Tensor) -> bool:
        """Write and attend for the requests of a plan in one call, where the format and the tensors allow that."""
        if self._step is None or self._step.pool is not kv_cache:
            layout = self.layout(kv_cache)
            if not cpu.DecodeStep.supports(layout.format, query.dtype):
                return False
            softmax = cpu.Softmax(self.scale, self.sliding_window, self.soft_cap, self.sinks)
            self._step = cpu.DecodeStep(kv_cache, layout, query.dtype, self._operands_of(layout), softmax)
        key, value, _ = self._unwritten or (None, None, None)
        if not self._step.takes(query, key, value, output):
            return False
        self._step(query, key, value, output, plan)
        return True

    def _take_residuals(self, layer: Any) -> cpu.Residuals | None:
        """What this layer's pages were last given, or those that it shares; forgotten where no other layer asks."""
        if self.kv_sharing_target_layer_name is not None:
            layer = get_forward_context().no_compile_layers[self.kv_sharing_target_layer_name]
        residuals: cpu.Residuals | None = layer.impl.residuals
        if layer.layer_name not in _SHARED:
            layer.impl.residuals = None
        return residuals

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
        plan, step, slots = attn_metadata.plan, attn_metadata.step, None
        if step is not None and self._decode(query, kv_cache, step, output):
            plan = attn_metadata.prompts
            if not plan.buckets:
                self._unwritten = None
                return output
            slots = step.other_slots
        self._write(kv_cache, slots)
        layout = self.layout(kv_cache)
        cpu.attend(
            query,
            kv_cache,
            layout,
            attn_metadata.block_table,
            plan,
            output,
            self._operands_of(layout),
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.soft_cap,
            sink_logits=self.sinks,
            residuals=self._take_residuals(layer),
        )
        return output
