"""What the packed cache can't serve, refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fraqtl_kernels.calibration.prompt import LENGTH, SEQUENCES
from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import check_head_size
from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE
from fraqtl_vllm import _vllm, hybrids, layer_formats, speculation
from fraqtl_vllm.checkpoint import gets_ours_instead
from fraqtl_vllm.config import KEY, FraqtlConfig, settings_of
from fraqtl_vllm.names import BACKEND_NAME, format_of
from fraqtl_vllm.stores.support import reasons as connector_reasons

ALIBI_MODELS = ("bloom", "mpt", "baichuan")
PLAIN_DTYPES = ("float16", "bfloat16")
"""What `--kv-cache-dtype` says for "the model's dtype"; what is stored is what `--kv-format` says."""


def asks_for_packed_cache(config: _vllm.VllmConfig) -> bool:
    """Whether somebody wants this engine's KV cache packed: by our backend, one of our formats, or settings of ours."""
    if format_of(config.cache_config.cache_dtype) is not None:
        return True
    attention = config.attention_config
    chosen = (attention.backend, *attention.backend_per_kind.values())
    if any(backend is not None and backend.name == BACKEND_NAME for backend in chosen):
        return True
    return isinstance(config.additional_config, dict) and KEY in config.additional_config


def choose_backend(config: _vllm.VllmConfig) -> None:
    """Choose ours where `--kv-cache-dtype` names one of our formats, and nobody chose one.

    Raises UnsupportedError if another was chosen.
    """
    attention, cache_dtype = config.attention_config, config.cache_config.cache_dtype
    if format_of(cache_dtype) is None:
        return
    if other := _another(attention.backend):
        raise UnsupportedError(
            f"--kv-cache-dtype {cache_dtype} needs --attention-backend {BACKEND_NAME}, and {other} was chosen: "
            "leave --attention-backend out"
        )
    attention.backend = _vllm.AttentionBackendEnum[BACKEND_NAME]


def choose_backend_of_drafts(config: _vllm.VllmConfig) -> None:
    """Choose ours for the layers of a model or head that drafts, which don't inherit that of the model.

    Raises UnsupportedError if another was chosen.
    """
    asked = config.speculative_config
    if asked is None:
        return
    if other := _another(asked.attention_backend):
        raise UnsupportedError(
            f"the packed KV cache serves all layers or none: --speculative-config has {other} for those that draft: "
            'leave "attention_backend" out'
        )
    asked.attention_backend = _vllm.AttentionBackendEnum[BACKEND_NAME]


def _another(backend: Any) -> str | None:
    """The name of a backend that was chosen and isn't ours."""
    return None if backend is None or backend.name == BACKEND_NAME else str(backend.name)


def check_backend_is_chosen(config: _vllm.VllmConfig) -> None:
    """Raises UnsupportedError if a packed cache was asked for, but another backend was chosen for some layer."""
    attention = config.attention_config
    for kind, backend in attention.backend_per_kind.items():
        if backend.name != BACKEND_NAME:
            raise UnsupportedError(
                f"the packed KV cache serves all layers or none: backend_per_kind has {backend.name} for {kind}"
            )
    if attention.backend is None or attention.backend.name != BACKEND_NAME:
        chosen = "no attention backend" if attention.backend is None else f"attention backend {attention.backend.name}"
        raise UnsupportedError(
            f"a packed KV cache was asked for together with {chosen}: add --attention-backend {BACKEND_NAME}"
        )


def check_supported(config: _vllm.VllmConfig) -> FraqtlConfig:
    """Our settings. Raises UnsupportedError in one sentence for what would not work or is untested."""
    ours = settings_of(config)
    for reason in _reasons(config, ours):
        raise UnsupportedError(f"the packed KV cache does not support {reason}")
    if config.model_config is not None and config.model_config.is_hybrid:
        hybrids.check(config)
    if config.model_config is not None and not speculation.is_draft(config):
        layer_formats.check(config, ours)
    return ours


def _reasons(config: _vllm.VllmConfig, ours: FraqtlConfig) -> Iterator[str]:
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    yield from _cache_dtype_reasons(config)
    yield from speculation.reasons(config)
    yield from connector_reasons(config)
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism: use --tensor-parallel-size"
    if parallel.use_ubatching:  # both would write to the scratch that layers share
        yield "two micro-batches at once: leave --enable-dbo and --ubatch-size out"
    if cache.user_specified_block_size and cache.block_size % BLOCK_SIZE_MULTIPLE:
        yield f"--block-size {cache.block_size}: it must be a multiple of {BLOCK_SIZE_MULTIPLE}"
    if any(each.needs_calibration for each in ours.formats) and (obstacle := calibration_obstacle(config)):
        yield f"KV format {ours.format_name} with {obstacle}: its static scales can't be calibrated"
    for each, name in ((model, "model"), (speculation.draft_model_of(config), "draft model")):
        if each is not None:
            yield from _model_reasons(each, name)
    if model is not None and model.is_hybrid and parallel.pipeline_parallel_size > 1:
        yield "hybrid models with pipeline parallelism yet: use --tensor-parallel-size"


def _cache_dtype_reasons(config: _vllm.VllmConfig) -> Iterator[str]:
    cache, model = config.cache_config, config.model_config
    given = cache.cache_dtype
    if given in PLAIN_DTYPES and model is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        if given != dtype:
            yield f"--kv-cache-dtype {given} for a model in {dtype}: leave it out, or add --dtype {given}"
    elif given != "auto" and format_of(given) is None and not gets_ours_instead(config):
        yield (
            f"--kv-cache-dtype {given}: it stores its own formats, "
            "choose one with --kv-format and leave --kv-cache-dtype out"
        )
    if cache.kv_cache_dtype_skip_layers:
        yield "--kv-cache-dtype-skip-layers: name layers and their formats with --kv-layers"


def calibration_obstacle(config: _vllm.VllmConfig) -> str | None:
    """What keeps the built-in prompt from being run through the model at start-up, or None."""
    if config.lora_config is None or config.model_config is None:
        return None
    tokens = SEQUENCES * min(LENGTH, config.model_config.max_model_len)
    given = config.scheduler_config.max_num_batched_tokens
    # Layers with LoRA have room for so many tokens at once, whoever runs them
    return None if given >= tokens else f"LoRA and --max-num-batched-tokens {given} (give {tokens} or more)"


def _model_reasons(model: Any, name: str) -> Iterator[str]:
    text_config = model.hf_text_config
    if model.use_mla:
        yield f"MLA models such as this {text_config.model_type}: their cache is compressed by design"
    elif model.is_encoder_decoder:
        yield f"encoder-decoder models such as this {text_config.model_type}: cross attention keeps no packed blocks"
    elif model.is_attention_free:
        yield f"models without attention such as this {text_config.model_type}: they keep no KV cache"
    elif getattr(model.attn_type, "value", model.attn_type) not in ("decoder", "hybrid"):
        yield f"encoder models such as this {text_config.model_type}: they keep no KV cache"
    elif _keeps_states_unknown_to_vllm(model):
        yield f"hybrid models such as this {text_config.model_type}, for which vLLM has no code of its own"
    elif _uses_alibi(text_config):
        yield f"ALiBi models such as this {text_config.model_type}"
    else:
        try:
            check_head_size(model.get_head_size())
        except UnsupportedError as error:
            yield f"this {name}: {error}"


def _keeps_states_unknown_to_vllm(model: Any) -> bool:
    """Whether transformers' layers would run in vLLM, and some of them keep a state, which no pool would have."""
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    return model.using_transformers_backend() and any(kind in hybrids.STATE_LAYERS for kind in kinds)


def _uses_alibi(text_config: Any) -> bool:
    return text_config.model_type in ALIBI_MODELS or bool(getattr(text_config, "alibi", False))
