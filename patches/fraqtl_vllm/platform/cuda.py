"""A CUDA GPU, whose platform is vLLM's own: ours is its backend where `--kv-cache-dtype` names one of our formats.

So it is of layers that draft, for which vLLM chooses one anew.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.platforms import current_platform

from fraqtl_vllm import _vllm, hooks


def install() -> None:
    """Called in every process, when its platform is settled. Does nothing on another platform."""
    if current_platform.is_cuda():
        hooks.NAMED_FORMATS.wrap(type(current_platform), _after_a_choice)


def _after_a_choice(original: Callable[..., None]) -> Callable[..., None]:
    def check_and_update_config(vllm_config: _vllm.VllmConfig) -> None:
        from fraqtl_vllm.support import asks_for_packed_cache, choose_backend, choose_backend_of_drafts

        choose_backend(vllm_config)
        if asks_for_packed_cache(vllm_config):
            choose_backend_of_drafts(vllm_config)
        original(vllm_config)

    return check_and_update_config
