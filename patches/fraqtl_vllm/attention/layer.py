"""One attention layer over packed pages: what the device halves share."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata, AttentionType

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import KVFormat, check_head_size
from fraqtl_kernels.pages import PageLayout
from fraqtl_vllm import speculation
from fraqtl_vllm._vllm import get_current_vllm_config
from fraqtl_vllm.calibration.recorder import Recorder
from fraqtl_vllm.checkpoint import warn_of_unused_scales
from fraqtl_vllm.start import progress
from fraqtl_vllm.support import check_supported

M = TypeVar("M", bound=AttentionMetadata)


class FraqtlImpl(AttentionImpl[M], Generic[M]):
    """What a layer is, whatever the device: its arguments, checked, and its format.

    A device half adds `do_kv_cache_update` and `forward`.
    """

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
        self.settings = check_supported(config)
        warn_of_unused_scales(config, self.settings.format_name)
        check_head_size(head_size)
        progress.say_once("loading the model")
        if alibi_slopes is not None:
            raise UnsupportedError("the packed KV cache does not support ALiBi models")
        if attn_type != AttentionType.DECODER:
            raise UnsupportedError(
                f"the packed KV cache does not support {AttentionType(attn_type).value} attention, only decoders"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.soft_cap = logits_soft_cap or None
        self.sinks = sinks  # a parameter of the model: what it holds is loaded later
        if sinks is not None and sinks.shape != (num_heads,):
            raise ValueError(f"{num_heads} query heads need as many sinks, not {tuple(sinks.shape)}")
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.constants = IDENTITY
        self.recorder: Recorder | None = None
        self.is_draft = False
        self.kv_format = self.settings.format

    def serve_drafts(self) -> None:
        """Called when it is known, after the models are loaded, that this layer is of the one that drafts."""
        self.is_draft = True
        self.use_format(speculation.format_of_drafts(self.settings))

    def use_format(self, kv_format: KVFormat) -> None:
        """In the place of the settings' own, before there is a pool. The layer's number isn't known to begin with."""
        self.kv_format = kv_format

    def use_constants(self, constants: LayerConstants) -> None:
        """What calibration found for this layer, once, before the first page is written."""
        self.constants = constants

    def warm_up(self, kv_cache: Tensor) -> None:
        """Compile what serving will need, once the cache is there, before CUDA graphs and the first request."""

    def attend_without_cache(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """A run before there is a batch: vLLM's profiling, where the output doesn't matter, or calibration."""
        if self.recorder is None:
            return output.fill_(0)
        attended = self.recorder.attend(
            layer.layer_name,
            self.kv_sharing_target_layer_name,
            query,
            key,
            value,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.soft_cap,
            sink_logits=None if self.sinks is None else self.sinks.detach(),
        )
        return output.copy_(attended.view_as(output))

    def layout(self, kv_cache: Tensor) -> PageLayout:
        """kv_cache: (blocks, KV heads, N, bytes per token) uint8, vLLM's view of this layer's pool."""
        return PageLayout(self.kv_format, self.head_size, kv_cache.shape[2])
