"""What vLLM's workers do for us: say in which format pages are, be checked, calibrate, warm up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fraqtl_vllm import _vllm, hooks, hybrids, layer_formats, speculation


def install() -> None:
    """Called in a worker's process, before it is made. It is checked, calibrates and warms up with its cache there."""
    hooks.SPECS.put(_vllm.WorkerWrapperBase, _get_kv_cache_spec)
    hooks.LAYOUTS.put(_vllm.WorkerWrapperBase, _get_supported_kv_cache_layouts)
    hooks.WORKER_IS_READY.wrap(_vllm.WorkerWrapperBase, _then_made_ready)


def _get_kv_cache_spec(self: Any) -> Any:
    """The worker's own, under its configuration, each in the format of its layer. The model is loaded by then."""
    from fraqtl_vllm.calibration.forward import packed_layers

    layers = packed_layers(self.vllm_config)
    with _vllm.set_current_vllm_config(self.vllm_config):
        speculation.tell_layers(self.worker.model_runner, layers)
        specs = hybrids.without_checkpoints(self.worker.get_kv_cache_spec())
    return layer_formats.in_own_formats(self.vllm_config, specs, layers)


def _get_supported_kv_cache_layouts(self: Any) -> list[str]:
    """The worker's own, under its configuration."""
    with _vllm.set_current_vllm_config(self.vllm_config):
        return self.worker.get_supported_kv_cache_layouts()


def _then_made_ready(original: Callable[..., None]) -> Callable[..., None]:
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        from fraqtl_vllm.attention.check import check_worker
        from fraqtl_vllm.calibration.forward import packed_layers
        from fraqtl_vllm.calibration.worker import calibrate_worker

        check_worker(self.worker)
        calibrate_worker(self.worker)
        for layer in packed_layers(self.worker.vllm_config).values():
            layer.impl.warm_up(layer.kv_cache)

    return initialize_from_config
