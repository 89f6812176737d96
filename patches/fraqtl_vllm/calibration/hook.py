"""Where vLLM's workers, once their KV cache is there, come to be checked, to calibrate and to warm up."""

from __future__ import annotations

from typing import Any

from fraqtl_vllm import _vllm


def install() -> None:
    """Let every worker be checked, calibrate and warm up once its KV cache is there. Called in its process before it is
    made."""
    wrapper = _vllm.WorkerWrapperBase
    original = wrapper.initialize_from_config
    if getattr(original, "is_fraqtl", False):
        return

    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        from fraqtl_vllm.calibration.worker import calibrate_worker, packed_layers
        from fraqtl_vllm.start_check import check_worker

        check_worker(self.worker)
        calibrate_worker(self.worker)
        for layer in packed_layers(self.worker.vllm_config).values():
            layer.impl.warm_up(layer.kv_cache)

    initialize_from_config.is_fraqtl = True  # type: ignore[attr-defined]
    wrapper.initialize_from_config = initialize_from_config
