"""Arms on a GPU that aren't ours: FlashAttention 3, FlashInfer, and vLLM's own attention backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.kernels import _vllm
from fraqtl_bench.kernels.arms import Arm, Prepared, UnavailableError
from fraqtl_bench.kernels.shapes import Inputs

FLASHINFER_BYTES = 256 << 20


def paged(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values in shuffled blocks, (blocks, block size, KV heads, D) each."""
    shape = inputs.shape
    pools = []
    for source in (inputs.key, inputs.value):
        pool = torch.zeros(
            inputs.blocks * inputs.block_size, shape.kv_heads, shape.head_size, dtype=dtype, device=source.device
        )
        for r in range(shape.batch):
            pool[inputs.slots(r)] = source[r].to(dtype)
        pools.append(pool.view(inputs.blocks, inputs.block_size, shape.kv_heads, shape.head_size))
    return pools[0], pools[1]


def as_stored(inputs: Inputs, dtype: torch.dtype) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (inputs.key[0].to(dtype).to(torch.bfloat16), inputs.value[0].to(dtype).to(torch.bfloat16))


@dataclass(frozen=True)
class FlashAttention3:
    """The kernel of vLLM's default backend on Hopper, with the scheduling that vLLM prepares once a step."""

    name: str
    dtype: torch.dtype
    foreign: bool = True

    def prepare(self, inputs: Inputs) -> Prepared:
        try:
            flash = _vllm.flash_attention()
        except ImportError as error:
            raise UnavailableError(f"vLLM's flash attention can't be imported: {error}") from error
        if reason := _vllm.fa3_unavailable(flash):
            raise UnavailableError(reason)
        shape, device = inputs.shape, inputs.query.device
        key, value = paged(inputs, self.dtype)
        quantized = self.dtype != torch.bfloat16
        ones = torch.ones(shape.batch, shape.kv_heads, device=device) if quantized else None
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
        seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
        query, output = inputs.query.to(self.dtype), torch.empty_like(inputs.query)
        schedule = flash.get_scheduler_metadata(
            batch_size=shape.batch,
            max_seqlen_q=1,
            max_seqlen_k=shape.context,
            num_heads_q=shape.query_heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=seq_lens,
            qkv_dtype=self.dtype,
            cu_seqlens_q=starts,
            page_size=inputs.block_size,
            causal=True,
        )
        fresh = schedule.clone()  # the kernel counts tiles in it

        def call() -> None:
            flash.flash_attn_varlen_func(
                q=query,
                k=key,
                v=value,
                out=output,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=seq_lens,
                max_seqlen_k=shape.context,
                softmax_scale=inputs.scale,
                causal=True,
                block_table=inputs.order,
                scheduler_metadata=schedule,
                q_descale=ones,
                k_descale=ones,
                v_descale=ones,
                fa_version=3,
            )

        size = shape.bytes_read(2 * shape.head_size * self.dtype.itemsize)
        return Prepared(call, output, size, as_stored(inputs, self.dtype), lambda: schedule.copy_(fresh))


@dataclass(frozen=True)
class FlashInfer:
    """FlashInfer's paged decode on tensor cores, planned once as engines do. Compiled on first use."""

    name: str = "flashinfer-bf16"
    foreign: bool = True

    def prepare(self, inputs: Inputs) -> Prepared:
        try:
            import flashinfer
        except ImportError as error:
            raise UnavailableError(f"flashinfer can't be imported: {error}") from error
        shape, device = inputs.shape, inputs.query.device
        pages = inputs.order.shape[1]
        indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * pages
        last = torch.full((shape.batch,), (shape.context - 1) % inputs.block_size + 1, dtype=torch.int32, device=device)
        indices = inputs.order.flatten().contiguous()
        wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(FLASHINFER_BYTES, dtype=torch.uint8, device=device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr.clone(),
            paged_kv_indices_buffer=indices.clone(),
            paged_kv_last_page_len_buffer=last.clone(),
        )
        wrapper.plan(
            indptr,
            indices,
            last,
            shape.query_heads,
            shape.kv_heads,
            shape.head_size,
            inputs.block_size,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
            sm_scale=inputs.scale,
        )
        cache, output = paged(inputs, torch.bfloat16), torch.empty_like(inputs.query)
        size = shape.bytes_read(4 * shape.head_size)
        return Prepared(
            lambda: wrapper.run(inputs.query, cache, out=output), output, size, as_stored(inputs, torch.bfloat16)
        )


@dataclass(frozen=True)
class VllmBackend:
    """One of vLLM's own backends, through its metadata builder and implementation as the engine calls them."""

    name: str
    backend: str
    cache_dtype: str
    foreign: bool = True

    def prepare(self, inputs: Inputs) -> Prepared:
        try:
            return _vllm.prepare_backend(self.backend, self.cache_dtype, inputs)
        except ImportError as error:
            raise UnavailableError(f"vLLM's {self.backend} can't be imported: {error}") from error


def rivals() -> Iterator[Arm]:
    yield FlashAttention3("fa3-bf16", torch.bfloat16)
    yield FlashInfer()
    yield VllmBackend("vllm-triton-bf16", "TRITON_ATTN", "auto")
    yield FlashAttention3("fa3-fp8", torch.float8_e4m3fn)
    yield VllmBackend("vllm-int4-per-token-head", "TRITON_ATTN", "int4_per_token_head")
    yield VllmBackend("vllm-turboquant-4bit", "TURBOQUANT", "turboquant_4bit_nc")
