"""Says when the weights of a running engine are no longer those that its constants were made for.

Pages that were written with the old constants may be in use, and CUDA graphs hold them, so they stay. Each pipeline
stage speaks for itself: engines that share experts are told at different times, and must not wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm.config import settings_of

logger = _vllm.init_logger("vllm.fraqtl.calibration")


def watch(worker: Any, key: Callable[[], str]) -> None:
    """key: makes a hash of the worker's weights as they are."""
    then_compared = partial(_then_compared, settings_of(worker.vllm_config).format_name, key, key())
    hooks.RELOADED.wrap(worker, then_compared)
    hooks.UPDATED.wrap(worker, then_compared)


def _then_compared(
    kv_format: str, key: Callable[[], str], calibrated: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if key() != calibrated and _vllm.get_tp_group().is_first_rank:
            logger.warning(
                "The weights have changed, and the constants of the KV cache are those of the old ones: %s stores "
                "keys and values more coarsely than it could. A restart calibrates anew",
                kv_format,
            )
        return result

    return watched
