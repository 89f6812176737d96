"""vLLM's own CPU platform, where it was chosen past our plugin: it would ignore our backend, so there we refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vllm.platforms import current_platform

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm.names import BACKEND_NAME, IN_PLACE_OF


def install() -> None:
    """Called in every process, when its platform is settled. Does nothing on any other platform, ours included."""
    platform: Any = type(current_platform)
    if f"{platform.__module__}.{platform.__qualname__}" not in IN_PLACE_OF:
        return

    def then_refused(original: Callable[..., None]) -> Callable[..., None]:
        def check_and_update_config(vllm_config: _vllm.VllmConfig) -> None:
            original(vllm_config)
            refuse(vllm_config, platform.__name__)

        return check_and_update_config

    hooks.STOCK_CPU.wrap(platform, then_refused)


def refuse(vllm_config: _vllm.VllmConfig, platform: str) -> None:
    """Raises UnsupportedError if a packed cache was asked for."""
    from fraqtl_vllm.support import asks_for_packed_cache

    if asks_for_packed_cache(vllm_config):
        raise UnsupportedError(f"vLLM's platform {platform} does not offer {BACKEND_NAME}: {advice()}")


def advice() -> str:
    """What to do where vLLM took another platform than ours, or another backend than our platform offered."""
    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        return "unset VLLM_TARGET_DEVICE, which keeps vLLM from asking platform plugins"
    return "fraqtl-serve doctor says which platform is used; without FRAQTL this model can be served unpacked"
