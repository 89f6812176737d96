"""The CPU half of the backend: compiled kernels over the pages, for prefill and decode alike.

Where every request has one new token, a layer's write and attention are one compiled call. So vLLM's call to write
only notes what is to be written, and `forward`, which follows it, does both.

The keys of the running chunk are read back from their pages like all others, and its residuals are what the pages
would hold, so that chunking, prefix hits and preemption can't change what is attended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata

from fraqtl_kernels import cpu
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import KVFormat
from fraqtl_kernels.pages import PageLayout
from fraqtl_vllm._vllm import VllmConfig, get_current_vllm_config, get_forward_context
from fraqtl_vllm.attention.layer import FraqtlImpl
from fraqtl_vllm.attention.turns import Displaced, Turn, plan_turns, without
from fraqtl_vllm.config import settings_of
from fraqtl_vllm.start import progress

_SHARED: set[str] = set()  # names of layers whose pages other layers read, too


@dataclass
class Metadata(AttentionMetadata):
    """One step's batch, shared by all layers of a KV-cache group."""

    block_table: Tensor
    slot_mapping: Tensor
    plan: cpu.AttentionPlan
    prompts: cpu.AttentionPlan
    """The part of the plan that is left when the turns are over."""
    turns: tuple[Turn, ...]
    """Of the requests with one new token, or with drafts, if there are any."""

    @cached_property
    def prompt_slots(self) -> Tensor:
        """The slot mapping of the tokens that no turn takes; -1 for the others."""
        return without(self.slot_mapping, self.turns)


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Plans a step on the host; there are no CUDA graphs here."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        drafts = bool(layer_names) and all(layers[name].impl.is_draft for name in layer_names)
        self._most = 1 if drafts else most_in_turns(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        batch = common_attn_metadata
        plan = cpu.plan_attention(batch.query_start_loc.tolist(), batch.seq_lens.tolist())
        prompts, turns = plan.longer_than(self._most), plan_turns(batch, self._most)
        return Metadata(batch.block_table_tensor, batch.slot_mapping, plan, prompts, turns)


def most_in_turns(config: VllmConfig) -> int:
    """Requests with so many new tokens or fewer take turns: those of a speculation, where pages hold residuals."""
    has_residuals = any(each.has_residual for each in settings_of(config).formats)
    return 1 + config.num_speculative_tokens if has_residuals else 1


class Impl(FraqtlImpl[Metadata]):
    """One layer's write and attention on the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.settings.prefill_keys == "raw":
            raise UnsupportedError("prefill_keys 'raw' needs a GPU: on the CPU choose 'packed' or leave it out")
        self._dtype = torch.get_default_dtype()  # vLLM builds a model under its dtype
        self._compile(self.settings.formats)
        self.residuals: cpu.Residuals | None = None  # of the running batch, between write and attention
        self._unwritten: tuple[Tensor, Tensor, Tensor] | None = None
        self._operands: cpu.LayerOperands | None = None
        self._step: cpu.DecodeStep | None = None
        self._displaced: Displaced | None = None
        if self.kv_sharing_target_layer_name is not None:
            if most_in_turns(get_current_vllm_config()) > 1:
                raise UnsupportedError(
                    "the packed KV cache does not support speculative decoding of models whose layers share a cache "
                    "yet: leave --speculative-config out"
                )
            _SHARED.add(self.kv_sharing_target_layer_name)

    def _compile(self, formats: Iterable[KVFormat]) -> None:
        with progress.if_slow("compiling the kernels for this processor, once, in about half a minute"):
            for each in formats:
                cpu.warm_up(each, self._dtype)

    def serve_drafts(self) -> None:
        super().serve_drafts()
        self._compile([self.kv_format])

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

    def _decode(self, query: Tensor, kv_cache: Tensor, turns: tuple[Turn, ...], output: Tensor) -> bool:
        """Write and attend for the requests of all turns, where the format and the tensors allow that."""
        if self._step is None or self._step.pool is not kv_cache:
            layout = self.layout(kv_cache)
            if not cpu.DecodeStep.supports(layout.format, query.dtype):
                return False
            softmax = cpu.Softmax(self.scale, self.sliding_window, self.soft_cap, self.sinks)
            self._step = cpu.DecodeStep(kv_cache, layout, query.dtype, self._operands_of(layout), softmax)
            self._displaced = Displaced(layout)
        key, value, _ = self._unwritten or (None, None, None)
        if self._step.takes(query, key, value, output):
            self._take_turns(turns, query, key, value, output)
        elif len(turns) > 1:  # drafts can go no other way
            plain = torch.empty(output.shape, dtype=query.dtype)
            key, value = (x if x is None else x.to(query.dtype).contiguous() for x in (key, value))
            self._take_turns(turns, query.contiguous(), key, value, plain)
            output.copy_(plain)
        else:
            return False
        return True

    def _take_turns(
        self, turns: tuple[Turn, ...], query: Tensor, key: Tensor | None, value: Tensor | None, output: Tensor
    ) -> None:
        assert self._step is not None and self._displaced is not None
        self._displaced.forget()
        for turn in turns:
            self._displaced.copy(self._step.pool, turn)
            self._step(query, key, value, output, turn.plan)

    def take_back(self, kept: Tensor) -> None:
        """Undo what rejected drafts of the last step did to the pages. kept: (requests,) new tokens that stay."""
        if self._step is not None and self._displaced is not None:
            self._displaced.take_back(self._step.pool, kept)

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
        plan, turns, slots = attn_metadata.plan, attn_metadata.turns, None
        if turns and self._decode(query, kv_cache, turns, output):
            plan = attn_metadata.prompts
            if not plan.buckets:
                self._unwritten = None
                return output
            slots = attn_metadata.prompt_slots
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
