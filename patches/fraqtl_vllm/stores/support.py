"""Which of vLLM's connectors may carry packed blocks: those that were tried, where they were tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fraqtl_vllm import _vllm
from fraqtl_vllm.config import settings_of

CONNECTOR = "OffloadingConnector"
STOCK_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")
"""vLLM's own, in whose place `SPEC` serves both: they copy on a GPU only."""
SPEC, SPEC_MODULE = "PackedOffloadingSpec", "fraqtl_vllm.stores.spec"
TIER = "fs"

LEAVE_OUT = "leave --kv-transfer-config and --kv-offloading-* out"
OTHERS = {
    "ExampleConnector": "it stores the first chunk of a prompt only, and loading it ends the engine",
    "LMCacheConnectorV1": "it has no copies for a CPU, and stores nothing",
    "SimpleCPUOffloadConnector": "its copies need CUDA",
}
"""By name of a connector why not; of all others it is not known whether they would do."""


def connector_of(config: _vllm.VllmConfig) -> str | None:
    """The name of the connector that an engine will have, also where vLLM has not written it down yet."""
    transfer, cache = config.kv_transfer_config, config.cache_config
    if cache.kv_offloading_size is not None:
        if cache.kv_offloading_backend != "native":
            return "LMCacheMPConnector"
        return "SimpleCPUOffloadConnector" if _vllm.envs().VLLM_USE_SIMPLE_KV_OFFLOAD else CONNECTOR
    return None if transfer is None else transfer.kv_connector or "without a name"


def reasons(config: _vllm.VllmConfig) -> Iterator[str]:
    """Why this engine can't have the connector that it asks for, each the rest of a sentence."""
    name = connector_of(config)
    if name is None:
        return
    extra: dict[str, Any] = {}
    if config.kv_transfer_config is not None:
        extra = config.kv_transfer_config.kv_connector_extra_config
        if config.kv_transfer_config.kv_connector_module_path:
            yield f"KV connectors of other packages such as {name}: choose {CONNECTOR}, or {LEAVE_OUT}"
    if not _vllm.current_platform.is_cpu():
        yield f"KV connectors on a GPU yet: {LEAVE_OUT}"
    if name != CONNECTOR:
        why = f" ({OTHERS[name]})" if name in OTHERS else ""
        yield f"the KV connector {name}{why}: choose {CONNECTOR}, or {LEAVE_OUT}"
    yield from _setting_reasons(extra)
    yield from _engine_reasons(config)


def _setting_reasons(extra: dict[str, Any]) -> Iterator[str]:
    spec = extra.get("spec_name", SPEC)
    if spec not in (SPEC, *STOCK_SPECS):
        yield f'the offloading spec {spec}: choose {" or ".join(STOCK_SPECS)}, or leave "spec_name" out'
    if extra.get("canonical_layout"):
        yield 'blocks in the canonical layout, which takes pages apart: leave "canonical_layout" out'
    tiers = extra.get("secondary_tiers", [])
    kinds = [tier.get("type") if isinstance(tier, dict) else tier for tier in tiers] if isinstance(tiers, list) else []
    for kind in kinds:
        if kind != TIER:
            yield f'secondary tiers of type {kind}: choose "{TIER}", a folder of files'


def _engine_reasons(config: _vllm.VllmConfig) -> Iterator[str]:
    parallel = config.parallel_config
    if config.model_config is not None and config.model_config.is_hybrid:
        yield f"KV connectors for hybrid models, whose states they would have to carry, too: {LEAVE_OUT}"
    if config.model_config is not None and _has_windows(config.model_config.hf_text_config):
        yield f"KV connectors for models with sliding windows yet: {LEAVE_OUT}"
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
        yield f"KV connectors with pipeline or data parallelism yet: use --tensor-parallel-size, or {LEAVE_OUT}"
    if config.speculative_config is not None:
        yield f"KV connectors with speculative decoding yet: leave --speculative-config out, or {LEAVE_OUT}"
    if settings_of(config).kv_layers:
        yield f"KV connectors with formats of single layers yet: {LEAVE_OUT}"
    if config.lora_config is not None:
        yield f"KV connectors with LoRA: blocks in a store know an adapter's name only, {LEAVE_OUT}"


def _has_windows(text_config: Any) -> bool:
    """There a report said a block more than the engine held, now and then: see the guide."""
    kinds = getattr(text_config, "layer_types", None)
    has_size = getattr(text_config, "sliding_window", None) is not None
    return has_size and (kinds is None or "sliding_attention" in kinds)


def use_packed_spec(config: _vllm.VllmConfig) -> None:
    """Have the connector's blocks copied by us, and kept under our fingerprint."""
    if connector_of(config) is None:
        return
    if config.kv_transfer_config is None:  # vLLM fills it in later, from --kv-offloading-size
        config.kv_transfer_config = _vllm.KVTransferConfig()
    spec = {"spec_name": SPEC, "spec_module_path": SPEC_MODULE}
    config.kv_transfer_config.kv_connector_extra_config.update(spec)
