"""The CUDA half of the backend: Triton kernels over the pages, in CUDA graphs for decoding.

Decoding: one launch, or two, over packed pages for all requests with at most `decode_queries` new tokens. The
launch shape follows from host numbers that a graph fixes (requests, query tokens, the longest context allowed),
never from lengths, which stay on the device; so nothing waits for it, and a captured step serves every batch of
its size. Prompts: vLLM's flash attention over the chunk's raw keys and its dequantized prefix (`cuda_prefill.py`),
or, with `prefill_keys: packed`, our own kernel over the packed keys, the chunk's included, as on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)

from fraqtl_kernels.constants import IDENTITY, LayerConstants
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import FORMATS, HEAD_SIZES, KVFormat
from fraqtl_kernels.gpu.constexprs import has_kernels
from fraqtl_kernels.gpu.decode import decode
from fraqtl_kernels.gpu.operands import LayerOperands, calibrated_bytes
from fraqtl_kernels.gpu.plan import MAX_QUERIES, DecodePlan, plan_decode
from fraqtl_kernels.gpu.prefill import prefill
from fraqtl_kernels.gpu.write import write
from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE, PageLayout
from fraqtl_vllm._vllm import VllmConfig, get_current_vllm_config
from fraqtl_vllm.attention import cuda_prefill
from fraqtl_vllm.attention.cuda_buffers import Buffers
from fraqtl_vllm.attention.layer import FraqtlImpl
from fraqtl_vllm.attention.passes import list_chunks
from fraqtl_vllm.start import progress

DTYPES = (torch.float16, torch.bfloat16)
OLDEST_GPU = (8, 0)
WITHOUT_RESIDUALS = "with drafts the pages have no residuals on a GPU"
INTERPRETED_SMS = 4  # where there is no GPU: Triton's interpreter, in tests


def check_gpu(capability: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises UnsupportedError for a GPU or a model that the kernels weren't written for."""
    if capability < OLDEST_GPU:
        raise UnsupportedError(
            f"the packed KV cache needs a GPU of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or later "
            f"(Ampere), this one has {capability[0]}.{capability[1]}"
        )
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"the packed KV cache does not support {str(dtype).removeprefix('torch.')} models on a GPU: "
            "choose --dtype bfloat16 or float16"
        )


def check_format(format: KVFormat) -> None:
    """Raises UnsupportedError for a format that the Triton kernels can't read."""
    if not has_kernels(format):
        valid = ", ".join(name for name, known in FORMATS.items() if has_kernels(known))
        raise UnsupportedError(f"the format {format.name} has no GPU kernels yet: choose one of {valid}")


def decode_queries(config: VllmConfig) -> int:
    """The most new tokens of a request that the decode kernel takes: one, or those of a speculation."""
    return min(MAX_QUERIES, max_decode_query_len(config))


@dataclass
class Metadata(AttentionMetadata):
    """One step's batch, shared by all layers of a KV-cache group.

    block_table, query_start, seq_lens: vLLM's own device buffers. decodes: requests at the front of the batch that
    are decoded. queries: a bound on their new tokens. prefills: the other requests. max_query_len: a bound on
    anyone's new tokens.
    """

    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    decodes: int
    queries: int
    prefills: cuda_prefill.Prefills | None
    max_query_len: int


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Splits a batch into decodes and chunks, on the host."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM puts requests with at most this many new tokens first.
        self.reorder_batch_threshold: int = decode_queries(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs for batches with up to MAX_QUERIES new tokens a request."""
        if max_decode_query_len(vllm_config) > MAX_QUERIES:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> int | None:
        """Of different lengths too: the kernel reads every request's own count from the device."""
        return decode_queries(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        batch, most = common_attn_metadata, self.reorder_batch_threshold
        decodes, prefills = batch.num_reqs, None
        if batch.max_query_len > most:
            start = batch.query_start_loc_cpu.tolist()
            counts = [end - begin for begin, end in pairwise(start)]
            decodes = next((row for row, count in enumerate(counts) if count > most), len(counts))
            if batch.seq_lens_cpu_upper_bound is None:
                raise ValueError("the lengths of prompts must be known on the host")
            seq_lens = batch.seq_lens_cpu_upper_bound.tolist()
            prefills = cuda_prefill.Prefills(list_chunks(start, seq_lens, decodes))
        return Metadata(
            batch.block_table_tensor,
            batch.query_start_loc,
            batch.seq_lens,
            decodes,
            min(batch.max_query_len, most),
            prefills,
            batch.max_query_len,
        )


class Impl(FraqtlImpl[Metadata]):
    """One layer's write and attention on a GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.head_size not in HEAD_SIZES:
            raise UnsupportedError(f"the packed KV cache does not support head size {self.head_size} on a GPU yet")
        config = get_current_vllm_config()
        packed = self.settings.prefill_keys == "packed"
        # The pages don't hold the residuals of a chunk, and would lose some to drafts that are rejected.
        drafts = config.speculative_config is not None
        self.no_residuals = packed or drafts
        if drafts and not packed and self.kv_format.has_residual:
            progress.say_once(WITHOUT_RESIDUALS)
        self.dtype = config.model_config.dtype
        self.device = torch.device(config.device_config.device)
        capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
        check_gpu(OLDEST_GPU if capability is None else (capability.major, capability.minor), self.dtype)
        self.max_seq_len = config.model_config.max_model_len
        self.max_requests, self.max_queries = config.scheduler_config.max_num_seqs, decode_queries(config)
        self.num_sms = num_sms(self.device)
        self._plans: dict[tuple[PageLayout, int, int], DecodePlan] = {}
        self.buffers = Buffers.of_worker(self.device)
        self.use_format(self.kv_format)
        # A layer that reads another one's cache is given no keys that are in it.
        self.packed = packed or self.kv_sharing_target_layer_name is not None
        if not self.packed:
            self.flash = cuda_prefill.flash_attention(self.head_size, self.scale, self.sliding_window, self.soft_cap)
            tokens = cuda_prefill.workspace_tokens(
                self.num_kv_heads,
                self.head_size,
                self.sliding_window,
                config.scheduler_config.max_num_batched_tokens,
            )
            self.workspace = self.buffers.workspace(tokens, self.num_kv_heads, self.head_size, self.dtype)

    def _before_calibration(self) -> LayerConstants:
        """What vLLM's trial captures run with, before it calibrates. Formats with static scales have none of their own;
        `support.check_supported` makes sure that they will be calibrated before the first request."""
        if not self.kv_format.needs_calibration:
            return IDENTITY
        ones = torch.ones(self.num_kv_heads, self.head_size, dtype=torch.float32)
        return LayerConstants.of(key_scale=ones, value_scale=ones)

    def use_format(self, kv_format: KVFormat) -> None:
        """With its operands, and with the memory that it will need, which vLLM is to count before it sizes the pool."""
        super().use_format(kv_format.without_residual if self.no_residuals else kv_format)
        check_format(self.kv_format)
        self.buffers.reserve_scratch(self._scratch_floats())
        self.use_constants(self._before_calibration())
        # What calibration will need.
        reserved = calibrated_bytes(self.kv_format, self.head_size, self.num_kv_heads)
        self.reserved: Tensor | None = torch.empty(reserved, dtype=torch.uint8, device=self.device)

    def serve_drafts(self) -> None:
        super().serve_drafts()
        self.reserved = None  # they are not calibrated
        # vLLM's bound for lengths leaves out tokens that it adds for drafts: chunks are read by lengths on the device.
        self.packed = True

    def use_constants(self, constants: LayerConstants) -> None:
        """Called before CUDA graphs are captured, which keep the addresses of what is made here."""
        super().use_constants(constants.to(torch.device("cpu")))
        self.reserved = None
        self.operands = LayerOperands.of(self.kv_format, self.head_size, self.dtype, self.device, constants)

    @property
    def _prefill_layer(self) -> cuda_prefill.Layer:
        return cuda_prefill.Layer(self.flash, self.workspace, self.sliding_window, self.operands, self.sinks)

    def warm_up(self, kv_cache: Tensor) -> None:
        self.reserved = None  # also without calibration
        if not self.packed and kv_cache.numel():
            cuda_prefill.warm_up(self._prefill_layer, kv_cache, self.layout(kv_cache))

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if kv_cache.numel():
            write(kv_cache, self.layout(kv_cache), key, value, slot_mapping, self.operands)

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
        batch, layout = attn_metadata, self.layout(kv_cache)
        if batch.decodes:
            self._decode(query, kv_cache, layout, batch, output)
        if batch.prefills is None:
            return output
        if self.packed:
            self._prefill_packed(query, kv_cache, layout, batch, output)
        else:
            cuda_prefill.attend(
                self._prefill_layer,
                query,
                key,
                value,
                kv_cache,
                layout,
                batch.block_table,
                batch.prefills,
                output,
            )
        return output

    def _decode(self, query: Tensor, pool: Tensor, layout: PageLayout, batch: Metadata, output: Tensor) -> None:
        decode(
            query,
            pool,
            layout,
            batch.block_table[: batch.decodes],
            batch.query_start[: batch.decodes + 1],
            batch.seq_lens[: batch.decodes],
            output,
            self.plan(layout, batch.decodes, batch.queries),
            self.operands,
            self.buffers.scratch,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.soft_cap,
            sink_logits=self.sinks,
        )

    def _prefill_packed(self, query: Tensor, pool: Tensor, layout: PageLayout, batch: Metadata, output: Tensor) -> None:
        prefill(
            query,
            pool,
            layout,
            batch.block_table[batch.decodes :],
            batch.query_start[batch.decodes :],
            batch.seq_lens[batch.decodes :],
            batch.max_query_len,
            output,
            self.operands,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.soft_cap,
            sink_logits=self.sinks,
        )

    def plan(self, layout: PageLayout, requests: int, queries: int) -> DecodePlan:
        """The launch of a decode batch, the same eagerly and in a graph."""
        key = (layout, requests, queries)
        if key not in self._plans:
            self._plans[key] = plan_decode(
                layout,
                requests=requests,
                queries=queries,
                query_heads=self.num_heads,
                kv_heads=self.num_kv_heads,
                max_seq_len=self.max_seq_len,
                num_sms=self.num_sms,
            )
        return self._plans[key]

    def _scratch_floats(self) -> int:
        """What the largest decode batch leaves between its launches."""
        layout = PageLayout(self.kv_format, self.head_size, BLOCK_SIZE_MULTIPLE)
        return max(
            self.plan(layout, requests, queries).scratch_floats(self.head_size)
            for requests in range(1, self.max_requests + 1)
            for queries in range(1, self.max_queries + 1)
        )


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
