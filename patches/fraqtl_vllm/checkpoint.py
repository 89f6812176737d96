"""Quantized checkpoints: whose weights are served where, and what becomes of the KV cache that one asks for."""

from __future__ import annotations

from typing import Any

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import _vllm
from fraqtl_vllm.names import GPT_OSS_WEIGHTS

FP8_CACHES = ("fp8", "fp8_e4m3")

logger = _vllm.init_logger("vllm.fraqtl.start")


def asked_cache_dtype(config: _vllm.VllmConfig) -> str | None:
    """The dtype of the KV cache that the checkpoint asks for, if it asks for any, as vLLM reads it."""
    if getattr(config.quant_config, "kv_cache_scheme", None) is not None:
        return "fp8"  # compressed-tensors: vLLM refuses any other
    if config.model_config is None:
        return None
    asked = _vllm.resolve_kv_cache_dtype_string("auto", config.model_config)
    return None if asked == "auto" else asked


def gets_ours_instead(config: _vllm.VllmConfig) -> bool:
    """Whether the checkpoint asks for an FP8 cache, and nobody said otherwise: then its pages are ours all the same."""
    given = config.cache_config.cache_dtype
    return given in FP8_CACHES and given == asked_cache_dtype(config)


def warn_of_unused_scales(config: _vllm.VllmConfig, kv_format: str) -> None:
    """Once, by the first rank, where `gets_ours_instead`."""
    if gets_ours_instead(config):
        logger.warning_once(
            "This checkpoint asks for an FP8 KV cache: its pages are stored as %s, and its scales of keys and values "
            "are not used",
            kv_format,
            scope="global",
        )


def check_weights(config: _vllm.VllmConfig) -> None:
    """For a CPU without vLLM's operators. Raises UnsupportedError for weights that nothing there multiplies."""
    quantization = config.quant_config
    if quantization is None or _is_served(quantization, has_experts=config.model_config.is_moe):
        return
    raise UnsupportedError(
        f"weights quantized by {quantization.get_name()} need operators that vLLM has on a GPU and in its CPU builds, "
        "but not here: choose a checkpoint in bfloat16, float16 or float32, gpt-oss in MXFP4, or compressed-tensors in "
        "FP8 with a scale a channel and dynamic activations"
    )


def _is_served(quantization: Any, *, has_experts: bool) -> bool:
    if quantization.get_name() == GPT_OSS_WEIGHTS:
        return True
    schemes: Any = getattr(quantization, "target_scheme_map", None)  # compressed-tensors: by what they are for
    if not schemes:
        return schemes is not None  # a checkpoint of which only the KV cache was quantized has none
    return not has_experts and all(map(_torch_multiplies, schemes.values()))


def _torch_multiplies(scheme: Any) -> bool:
    """FP8 weights with a scale a channel, and activations that are rounded as they come: the operators are torch's."""
    weights, inputs = scheme["weights"], scheme["input_activations"]
    both = (weights, inputs) if inputs is not None else ()
    is_fp8 = bool(both) and all(part.type == "float" and part.num_bits == 8 for part in both)
    return is_fp8 and weights.strategy == "channel" and inputs.strategy == "token" and bool(inputs.dynamic)
