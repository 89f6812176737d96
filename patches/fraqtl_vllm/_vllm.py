"""Every vLLM import of this package that is not a documented extension point.

These names move between minor versions, so they stand here only, behind a version check. Each is
imported when it is first asked for: vLLM loads our platform while its own configuration module is
half imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm import __version__ as VLLM_VERSION

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import compat, hooks

if TYPE_CHECKING:
    from vllm.config import (
        CompilationMode,
        KVTransferConfig,
        VllmConfig,
        get_current_vllm_config,
        set_current_vllm_config,
    )
    from vllm.config.vllm import get_current_vllm_config_or_none
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group
    from vllm.forward_context import get_forward_context, set_forward_context
    from vllm.logger import init_logger
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsMxfp4
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
    from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.zen_cpu import ZenCpuPlatform
    from vllm.sequence import IntermediateTensors
    from vllm.tokenizers.registry import cached_tokenizer_from_config
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info
    from vllm.utils.torch_utils import LayerNameType, resolve_kv_cache_dtype_string
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_capacity
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.kv_cache_interface import (
        AttentionSpec,
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheLayout,
        KVQuantMode,
        MambaSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
        iter_layer_specs,
    )
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
    from vllm.v1.kv_offload.file_mapper import FileMapper
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase
    from vllm.v1.worker.workspace import current_workspace_manager

VERSION = compat.minor(VLLM_VERSION)

_HOME = {
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base",
    "AttentionSpec": "vllm.v1.kv_cache_interface",
    "CPUExpertsMxfp4": "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
    "CPUWorker": "vllm.v1.worker.cpu_worker",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "CompilationMode": "vllm.config",
    "CpuPlatform": "vllm.platforms.cpu",
    "CustomOp": "vllm.model_executor.custom_op",
    "EngineCoreOutput": "vllm.v1.engine",
    "EngineCoreOutputs": "vllm.v1.engine",
    "EngineCoreProc": "vllm.v1.engine.core",
    "FileMapper": "vllm.v1.kv_offload.file_mapper",
    "FullAttentionSpec": "vllm.v1.kv_cache_interface",
    "GeluAndMul": "vllm.model_executor.layers.activation",
    "GemmaRMSNorm": "vllm.model_executor.layers.layernorm",
    "IntermediateTensors": "vllm.sequence",
    "KVCacheConfig": "vllm.v1.kv_cache_interface",
    "KVCacheGroupSpec": "vllm.v1.kv_cache_interface",
    "KVCacheLayout": "vllm.v1.kv_cache_interface",
    "KVQuantMode": "vllm.v1.kv_cache_interface",
    "KVTransferConfig": "vllm.config",
    "LayerNameType": "vllm.utils.torch_utils",
    "MambaSpec": "vllm.v1.kv_cache_interface",
    "MambaStateShapeCalculator": "vllm.model_executor.layers.mamba.mamba_utils",
    "ModelRegistry": "vllm.model_executor.models",
    "PunicaWrapperCPU": "vllm.lora.punica_wrapper.punica_cpu",
    "OffloadingWorker": "vllm.v1.kv_offload.base",
    "RMSNorm": "vllm.model_executor.layers.layernorm",
    "Request": "vllm.v1.request",
    "RequestStatus": "vllm.v1.request",
    "RotaryEmbedding": "vllm.model_executor.layers.rotary_embedding.base",
    "RowParallelLinear": "vllm.model_executor.layers.linear",
    "Scheduler": "vllm.v1.core.sched.scheduler",
    "SharedOffloadRegion": "vllm.v1.kv_offload.cpu.shared_offload_region",
    "SiluAndMul": "vllm.model_executor.layers.activation",
    "SlidingWindowSpec": "vllm.v1.kv_cache_interface",
    "TieringOffloadingSpec": "vllm.v1.kv_offload.tiering.spec",
    "TransferResult": "vllm.v1.kv_offload.base",
    "UniformTypeKVCacheSpecs": "vllm.v1.kv_cache_interface",
    "VllmConfig": "vllm.config",
    "WorkerBase": "vllm.v1.worker.worker_base",
    "WorkerWrapperBase": "vllm.v1.worker.worker_base",
    "ZenCpuPlatform": "vllm.platforms.zen_cpu",
    "cached_tokenizer_from_config": "vllm.tokenizers.registry",
    "current_platform": "vllm.platforms",
    "current_workspace_manager": "vllm.v1.worker.workspace",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "flash_attn_varlen_func": "vllm.v1.attention.backends.fa_utils",
    "generate_scheduler_kv_cache_config": "vllm.v1.core.kv_cache_utils",
    "get_allowed_cpu_list": "vllm.utils.cpu_resource_utils",
    "get_current_vllm_config": "vllm.config",
    "get_current_vllm_config_or_none": "vllm.config.vllm",
    "get_flash_attn_version": "vllm.v1.attention.backends.fa_utils",
    "get_forward_context": "vllm.forward_context",
    "get_kv_cache_capacity": "vllm.v1.core.kv_cache_utils",
    "get_memory_node_info": "vllm.utils.cpu_resource_utils",
    "get_pp_group": "vllm.distributed.parallel_state",
    "get_tp_group": "vllm.distributed.parallel_state",
    "get_world_group": "vllm.distributed.parallel_state",
    "init_logger": "vllm.logger",
    "initialize_mamba_ssu_backend": "vllm.model_executor.layers.mamba.ops.ssu_dispatch",
    "iter_layer_specs": "vllm.v1.kv_cache_interface",
    "merge_attn_states": "vllm.v1.attention.ops.merge_attn_states",
    "register_kernels": "vllm.triton_utils.dispatcher",
    "resolve_kv_cache_dtype_string": "vllm.utils.torch_utils",
    "set_current_vllm_config": "vllm.config",
    "set_forward_context": "vllm.forward_context",
}

__all__ = [
    "VERSION",
    "VLLM_VERSION",
    "AsyncScheduler",
    "AttentionBackendEnum",
    "AttentionLayerBase",
    "AttentionSpec",
    "CPUExpertsMxfp4",
    "CPUWorker",
    "CommonAttentionMetadata",
    "CompilationMode",
    "CpuPlatform",
    "CustomOp",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreProc",
    "FileMapper",
    "FullAttentionSpec",
    "GeluAndMul",
    "GemmaRMSNorm",
    "IntermediateTensors",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "KVCacheLayout",
    "KVQuantMode",
    "KVTransferConfig",
    "LayerNameType",
    "MambaSpec",
    "MambaStateShapeCalculator",
    "ModelRegistry",
    "OffloadingWorker",
    "PunicaWrapperCPU",
    "RMSNorm",
    "Request",
    "RequestStatus",
    "RotaryEmbedding",
    "RowParallelLinear",
    "Scheduler",
    "SharedOffloadRegion",
    "SiluAndMul",
    "SlidingWindowSpec",
    "TieringOffloadingSpec",
    "TransferResult",
    "UniformTypeKVCacheSpecs",
    "VllmConfig",
    "WorkerBase",
    "WorkerWrapperBase",
    "ZenCpuPlatform",
    "cached_tokenizer_from_config",
    "current_platform",
    "current_workspace_manager",
    "engine_core",
    "envs",
    "extract_layer_index",
    "flash_attn_varlen_func",
    "gated_delta_layers",
    "generate_scheduler_kv_cache_config",
    "get_allowed_cpu_list",
    "get_current_vllm_config",
    "get_current_vllm_config_or_none",
    "get_flash_attn_version",
    "get_forward_context",
    "get_kv_cache_capacity",
    "get_kv_cache_configs",
    "get_memory_node_info",
    "get_pp_group",
    "get_tp_group",
    "get_world_group",
    "import_model",
    "init_logger",
    "initialize_mamba_ssu_backend",
    "iter_layer_specs",
    "merge_attn_states",
    "register_cache_dtypes",
    "register_kernels",
    "resolve_kv_cache_dtype_string",
    "scan_of_vllm_only",
    "set_current_vllm_config",
    "set_forward_context",
]


def check_version(version: str = VLLM_VERSION) -> None:
    """Raises UnsupportedError for a vLLM that this code was not written for."""
    sentence = compat.not_supported(version)
    if sentence is not None:
        raise UnsupportedError(sentence)


def get_kv_cache_configs(config: Any, specs: list[dict[str, Any]], memory: list[int]) -> list[Any]:
    """vLLM's plan of every rank's pool, from the specs of its layers. Since 0.33 vLLM groups layers before it plans."""
    check_version()
    if VERSION == "0.32":
        return import_module("vllm.v1.core.kv_cache_utils").get_kv_cache_configs(config, specs, memory)
    planning = import_module("vllm.v1.core.kv_cache_planning")
    return planning.get_kv_cache_configs(config, specs, memory, planning.get_global_kv_cache_groups(config, specs))


def register_cache_dtypes(names: Iterable[str]) -> None:
    """Let `--kv-cache-dtype` take these names for caches of bytes. vLLM 0.32 has no place for that.

    Their mode is that of unpacked caches: none of vLLM's own kernels sees the pages, and the mode for caches
    that a backend keeps by itself, CUSTOM, has the number of a format for AMD's GPUs.
    """
    check_version()
    if VERSION == "0.32":
        return
    cache = import_module("vllm.config.cache")
    for name in names:
        if not cache.is_known_kv_cache_dtype(name):
            cache.register_kv_cache_dtype(name)(partial(_Bytes, name))


@dataclass(frozen=True)
class _Bytes:
    """See vLLM's KVCacheDTypeHandler protocol."""

    name: str

    def torch_dtype(self) -> Any:
        return import_module("torch").uint8

    def quant_mode(self) -> Any:
        return import_module("vllm.v1.kv_cache_interface").KVQuantMode.NONE


def envs() -> Any:
    """vLLM's environment variables, by name, as they are now."""
    return import_module("vllm.envs")


def engine_core() -> Any:
    """The module in which vLLM's engine starts: it has names of its own for what it imports."""
    check_version()
    return import_module("vllm.v1.engine.core")


def import_model(architecture: str) -> None:
    """Load vLLM's module of a model. Raises what that raises."""
    check_version()
    model: Any = import_module("vllm.model_executor.models").ModelRegistry.models[architecture]
    import_module(model.module_name)


def gated_delta_layers() -> Any:
    """The module of what gated delta layers compute on a CPU."""
    check_version()
    return import_module("vllm.model_executor.layers.mamba.ops.cpu.gdn_attention")


@contextmanager
def scan_of_vllm_only(*homes: str) -> Iterator[None]:
    """Where `register_kernels` looks for references to a kernel: in vLLM's own modules.

    homes: modules with kernels, which must be imported by then.

    It looks at every object of every module, and stumbles over those that invent attributes: llvmlite's, once Numba
    has been imported, or a client's mocks.
    """
    for home in homes:
        import_module(home)
    of_vllm = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    with hooks.KERNEL_SCAN.put_for_now(import_module("vllm.triton_utils.dispatcher"), SimpleNamespace(modules=of_vllm)):
        yield


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version()
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
