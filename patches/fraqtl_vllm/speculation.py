"""Which speculative decoding the packed cache serves: what was tested, and the reasons against the rest."""

from __future__ import annotations

from collections.abc import Iterator

from fraqtl_vllm import _vllm
from fraqtl_vllm.config import settings_of

METHODS = ("ngram",)
LEAVE_OUT = "leave --speculative-config out"


def reasons(config: _vllm.VllmConfig) -> Iterator[str]:
    """What of a configuration's speculation is not served, as `support` says it."""
    asked = config.speculative_config
    if asked is None:
        return
    parallel, model = config.parallel_config, config.model_config
    if not getattr(_vllm.current_platform, "serves_drafts", False):
        yield f"speculative decoding on GPUs and vLLM's CPU builds yet: {LEAVE_OUT}"
    if getattr(config, "use_v2_model_runner", False):
        yield "speculative decoding with vLLM's second model runner yet: set VLLM_USE_V2_MODEL_RUNNER=0"
    if asked.method not in METHODS:
        yield f"speculative decoding by {asked.method} yet: choose {' or '.join(METHODS)}"
    if asked.rejection_sample_method != "standard":
        yield f"rejection_sample_method {asked.rejection_sample_method}: choose standard"
    if parallel.world_size > 1 or parallel.data_parallel_size > 1:
        yield f"speculative decoding on several ranks yet: {LEAVE_OUT}"
    if settings_of(config).kv_layers:
        yield f"speculative decoding with formats of single layers yet: {LEAVE_OUT}"
    if model is not None and model.is_hybrid:
        yield f"speculative decoding of hybrid models yet: {LEAVE_OUT}"
