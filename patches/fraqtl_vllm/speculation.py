"""Which speculative decoding the packed cache serves: what was tested, and the reasons against the rest.

A model that drafts, or a head (EAGLE, multi-token prediction), has layers and pages of its own, in the same blocks as
the model's. They are stored without constants and without residuals: then a slot holds its token only, a rejected
draft's is simply written again, and nothing has to be given back. What a draft is worth is said by the model, so drafts
need be neither exact nor small.

On a GPU the model's own layers are stored without residuals, too, so all drafts are attended in one call, and a CUDA
graph needs nothing to be given back either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_kernels.formats import KVFormat, get_format
from fraqtl_vllm import _vllm
from fraqtl_vllm.config import FraqtlConfig

WITH_MODELS = ("draft_model", "eagle", "eagle3", "mtp")
METHODS = ("ngram", *WITH_MODELS)
FOR_HYBRIDS = ("ngram", "mtp")
HYBRIDS_ON_A_CPU = ("qwen3_next",)
"""Families whose states `platform.state_ops` can take back, by the model type of their text part."""
DRAFT_FORMAT = "k8v8"
MOST_ON_A_GPU = 7
"""Drafts of a request in a step. With its newest token, its queries are all that one call to decode takes."""
NOT_TRIED = (
    "parallel_drafting",
    "use_heterogeneous_vocab",
    "num_speculative_tokens_per_batch_size",
    "use_local_argmax_reduction",
    "kv_cache_dtype",
)
"""What vLLM lets models that draft do besides."""
LEAVE_OUT = "leave --speculative-config out"


def reasons(config: _vllm.VllmConfig) -> Iterator[str]:
    """What of a configuration's speculation is not served, as `support` says it."""
    asked = config.speculative_config
    if asked is None:
        return
    parallel, model = config.parallel_config, config.model_config
    yield from _platform_reasons(asked)
    if getattr(config, "use_v2_model_runner", False) and not _vllm.current_platform.is_cuda():
        yield "speculative decoding with vLLM's second model runner yet: set VLLM_USE_V2_MODEL_RUNNER=0"
    if asked.method not in METHODS:
        yield f"speculative decoding by {asked.method} yet: choose one of {', '.join(METHODS)}"
    if asked.rejection_sample_method != "standard":
        yield f"rejection_sample_method {asked.rejection_sample_method}: choose standard"
    if parallel.pipeline_parallel_size > 1:  # only the last stage hears which drafts are rejected
        yield f"speculative decoding with pipeline parallelism yet: use --tensor-parallel-size, or {LEAVE_OUT}"
    if model is not None and model.is_hybrid:
        yield from _hybrid_reasons(model.hf_text_config.model_type, asked.method)
    if asked.method in WITH_MODELS:
        yield from _draft_model_reasons(config, asked)


def _platform_reasons(asked: Any) -> Iterator[str]:
    if _vllm.current_platform.is_cuda():
        drafts = asked.num_speculative_tokens or 0
        if drafts > MOST_ON_A_GPU:
            yield f"{drafts} drafts a step on a GPU yet: choose num_speculative_tokens from 1 to {MOST_ON_A_GPU}"
    elif not getattr(_vllm.current_platform, "serves_drafts", False):
        yield f"speculative decoding on vLLM's CPU builds yet: {LEAVE_OUT}"


def _hybrid_reasons(family: str, method: str) -> Iterator[str]:
    if method not in FOR_HYBRIDS:
        choice = " or ".join(FOR_HYBRIDS)
        yield f"speculative decoding of hybrid models by {method} yet: choose {choice}, or {LEAVE_OUT}"
    if _vllm.current_platform.is_cpu() and family not in HYBRIDS_ON_A_CPU:
        yield f"speculative decoding of {family} models on a CPU yet: {LEAVE_OUT}"


def _draft_model_reasons(config: _vllm.VllmConfig, asked: Any) -> Iterator[str]:
    for option in NOT_TRIED:
        if getattr(asked, option, None):
            yield f'{option} in --speculative-config: leave "{option}" out'
    if config.lora_config is not None:
        yield f"draft models with LoRA yet: {LEAVE_OUT}"
    if asked.draft_model_config is not None and asked.draft_model_config.is_hybrid:
        yield f"hybrid models as draft models yet: {LEAVE_OUT}"


def draft_model_of(config: _vllm.VllmConfig) -> Any:
    """The configuration of the model or head that drafts, vLLM's ModelConfig, or None if there is none."""
    asked = config.speculative_config
    return asked.draft_model_config if asked is not None and asked.method in WITH_MODELS else None


def is_draft(config: _vllm.VllmConfig) -> bool:
    """Whether this is the configuration that vLLM makes for a draft model. A head has none of its own."""
    return getattr(config.model_config, "runner_type", None) == "draft"


def format_of_drafts(ours: FraqtlConfig) -> KVFormat:
    """That of a draft model's layers: none that has residuals, and the model's own where that isn't quantized."""
    return get_format(DRAFT_FORMAT) if ours.format.is_quantized else ours.format


def tell_layers(runner: Any, layers: Mapping[str, Any]) -> None:
    """Tell layers of a model or head that drafts. They are built like all others: vLLM says afterwards which they are.

    layers: those that our backend serves, by name.
    """
    # vLLM's first model runner has a drafter, its second a speculator.
    first: Set[str] = getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", frozenset())
    second: Set[str] = getattr(getattr(runner, "speculator", None), "draft_attn_layer_names", frozenset())
    for name in (first | second) & layers.keys():
        if not layers[name].impl.is_draft:
            layers[name].impl.serve_drafts()


def check_windows(specs: dict[str, Any]) -> None:
    """Raises UnsupportedError unless all layers, those of the draft model among them, can share one block table.

    vLLM hands that of the first group of layers to the draft model, whatever its own is.
    """
    if not _vllm.UniformTypeKVCacheSpecs.is_uniform_type(specs):
        raise UnsupportedError(
            "the packed KV cache does not support draft models where layers of the two models have unlike windows yet: "
            f"{LEAVE_OUT}"
        )
