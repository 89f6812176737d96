"""All that this package uses of vLLM: its flash attention, and its attention backends outside an engine."""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fraqtl_bench.kernels.arms import Prepared
from fraqtl_bench.kernels.shapes import Inputs, Shape


def flash_attention() -> ModuleType:
    """vLLM's interface to flash attention, which works without the rest of vLLM. Raises ImportError where it isn't."""
    return import_module("vllm.vllm_flash_attn.flash_attn_interface")


def fa3_unavailable(flash: ModuleType) -> str | None:
    """Why FlashAttention 3 can't run here; None if it can."""
    if not flash.FA3_AVAILABLE:
        return f"FlashAttention 3 can't be imported: {flash.FA3_UNAVAILABLE_REASON}"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "FlashAttention 3 needs a GPU of compute capability 9"
    return None


def engine_config(shape: Shape, block_size: int, backend: str, cache_dtype: str) -> Any:
    """A configuration of vLLM for a model with one layer of this shape; nothing is loaded."""
    from vllm.config import AttentionConfig, CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    hidden = shape.query_heads * shape.head_size
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context,
        "vocab_size": 256,
        "torch_dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        model_config = ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=shape.context,
        )
    return VllmConfig(
        model_config=model_config,
        cache_config=CacheConfig(block_size=block_size, cache_dtype=cache_dtype),
        scheduler_config=SchedulerConfig.default_factory(
            max_num_seqs=shape.batch,
            max_num_batched_tokens=max(shape.context, shape.batch),
            max_model_len=shape.context,
        ),
        attention_config=AttentionConfig(backend=AttentionBackendEnum[backend]),
    )


def prepare_backend(name: str, cache_dtype: str, inputs: Inputs) -> Prepared:
    """A batch of decode steps through one of vLLM's backends: its pool, its write, its metadata, its forward."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    shape, device = inputs.shape, inputs.query.device
    backend = AttentionBackendEnum[name].get_class()
    config = engine_config(shape, inputs.block_size, name, cache_dtype)
    spec = backend.customize_spec(
        FullAttentionSpec(
            block_size=inputs.block_size,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            dtype=STR_DTYPE_TO_TORCH_DTYPE.get(cache_dtype, torch.bfloat16),
            kv_quant_mode=get_kv_quant_mode(cache_dtype),
        )
    )
    with set_current_vllm_config(config):
        layer_impl = backend.get_impl_cls()(
            num_heads=shape.query_heads,
            head_size=shape.head_size,
            scale=inputs.scale,
            num_kv_heads=shape.kv_heads,
            alibi_slopes=None,
            sliding_window=None,
            kv_cache_dtype=cache_dtype,
            logits_soft_cap=None,
            attn_type="decoder",
            kv_sharing_target_layer_name=None,
        )
        builder = backend.get_builder_cls()(spec, ["layer"], config, device)
    width = spec.page_size_bytes // (inputs.block_size * shape.kv_heads * spec.dtype.itemsize)
    pool = torch.zeros(
        inputs.blocks, inputs.block_size, shape.kv_heads, width, dtype=spec.dtype, device=device
    ).transpose(1, 2)
    layer = unscaled_layer(device)
    for r in range(shape.batch):
        layer_impl.do_kv_cache_update(layer, inputs.key[r], inputs.value[r], pool, inputs.slots(r))
    metadata = builder.build(0, one_step(inputs))
    output = torch.empty_like(inputs.query)
    last = inputs.key[:, -1].contiguous(), inputs.value[:, -1].contiguous()

    def call() -> None:
        layer_impl.forward(layer, inputs.query, *last, pool, metadata, output=output)

    stored = None
    if cache_dtype == "auto":
        stored = lambda: (inputs.key[0], inputs.value[0])  # noqa: E731
    elif cache_dtype == "int4_per_token_head":
        stored = lambda: stored_int4(layer_impl, pool, inputs)  # noqa: E731
    return Prepared(call, output, shape.bytes_read(width * spec.dtype.itemsize), stored)


def unscaled_layer(device: torch.device) -> Any:
    """What backends ask of the layer object: scales, all one."""
    one = torch.ones((), device=device)
    names = ("q", "k", "v")
    tensors = {f"_{name}_scale": one for name in names}
    return SimpleNamespace(**tensors, **{f"_{name}_scale_float": 1.0 for name in names}, _prob_scale=one)


def one_step(inputs: Inputs) -> Any:
    """A decode step as a model runner describes it."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    shape, device = inputs.shape, inputs.query.device
    starts = torch.arange(shape.batch + 1, dtype=torch.int32)
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=shape.batch,
        num_actual_tokens=shape.batch,
        max_query_len=1,
        max_seq_len=shape.context,
        block_table_tensor=inputs.order,
        slot_mapping=torch.stack([inputs.slots(r)[-1] for r in range(shape.batch)]),
        is_prefilling=torch.zeros(shape.batch, dtype=torch.bool),
    )


def stored_int4(layer_impl: Any, pool: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What `int4_per_token_head` holds of the first request: (tokens, KV heads, D) float64.

    value = (code - zero point) · scale in a rotated basis; even dimensions in low nibbles; the zero point stands in
    the low four bits of the fp32 scale. The rotation's matrix has entries ±1, so it is read off exactly.
    """
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    size, slots = inputs.shape.head_size, inputs.slots(0)
    block, offset = slots // inputs.block_size, slots % inputs.block_size
    rotation = single_rht(torch.eye(size, device=pool.device)).double().round()
    norm = (rotation[0] ** 2).sum()
    caches = layer_impl._pth_key_value_caches(pool)
    found = []
    for cache, scales in zip(caches, (layer_impl._k_scale_cache, layer_impl._v_scale_cache), strict=True):
        codes = cache[block, offset][..., : size // 2].to(torch.int32)
        bits = scales[block, offset].contiguous().view(torch.int32)
        steps = torch.stack([codes & 15, codes >> 4], -1).flatten(-2) - (bits & 15)[..., None]
        scale = (bits & -16).view(torch.float32).double()
        found.append(steps.double() * scale[..., None] @ rotation.T / norm)
    return found[0], found[1]
