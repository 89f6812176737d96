"""What a stored page means: a hash of everything that its bytes follow from, beside the tokens.

Bytes of a page say nothing by themselves. The same tokens have other pages in another format, with other constants,
or from other weights. So blocks that outlive an engine, or leave it, are kept under this fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm.config import settings_of

KEY = "fraqtl_fingerprint"
"""Under which the connector finds it, in `kv_connector_extra_config`."""
LAYOUT_VERSION = 2
"""Of docs/reference/page-layout.md and of how tokens are rounded: another number makes all stored blocks unknown."""


def of_worker(worker: Any) -> str:
    """Of one rank's pages, once it is calibrated."""
    from fraqtl_vllm.calibration import files
    from fraqtl_vllm.calibration.forward import packed_layers
    from fraqtl_vllm.calibration.weights import add_weights

    config, model = worker.vllm_config, worker.model_runner.get_model()
    ours = settings_of(config)
    # Residuals and raw chunks are in no full page, but what the model makes of them is.
    reading = (ours.kv_format, ours.residual, ours.prefill_keys)
    digest = hashlib.sha256(repr((LAYOUT_VERSION, reading, str(config.model_config.dtype))).encode())
    add_weights(digest, model, config.model_config.dtype)
    for name, layer in sorted(packed_layers(config).items()):
        tensors = {part: tensor.cpu().contiguous() for part, tensor in layer.impl.constants.tensors().items()}
        made_of = (name, layer.impl.kv_format.name, layer.impl.head_size, layer.impl.num_kv_heads)
        digest.update(f"{made_of} {files.checksum(tensors)}".encode())
    return digest.hexdigest()


def of_engine(ranks: list[str]) -> str:
    """Of the pages of all ranks, in their order."""
    return hashlib.sha256(" ".join(ranks).encode()).hexdigest()[:32]


def install() -> None:
    """Tell the scheduler's connector what the workers' pages are. Called before an engine is made."""
    hooks.POOLS_ARE_READY.wrap(_vllm.engine_core().EngineCore, _then_told)


def _then_told(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        pool = original(self, vllm_config, *args, **kwargs)
        transfer = vllm_config.kv_transfer_config
        if transfer is not None and "fraqtl" in transfer.kv_connector_extra_config.get("spec_module_path", ""):
            transfer.kv_connector_extra_config[KEY] = of_engine(self.model_executor.collective_rpc(of_worker))
        return pool

    return _initialize_kv_caches
