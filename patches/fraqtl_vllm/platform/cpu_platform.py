"""vLLM's CPU platform on the stock (CUDA) wheel, which has no CPU extension.

Everything that is replaced is listed here:
  attention backend       ours, whatever is asked for: the stock one needs the CPU extension
  custom_ops              "none": layers run their torch versions
  torch.compile           off: it would compile C++ for minutes at every first start
  slot mapping, states    versions without Triton of the kernels that the model runner needs
  torch.ops._C            torch versions of the native ops that are left (`native_ops`, `state_ops`)
  worker                  ours (`cpu_worker`): the stock one dies of a request with a seed and a long prompt
  executor                in-process for one rank, vLLM's multiprocessing for tensor parallelism
  default block size      16 tokens, as on GPUs: the stock kernels that want 128 are not there

vLLM's CPU builds have that extension: there it is `native_cpu_platform`.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm import _vllm
from fraqtl_vllm.checkpoint import check_weights
from fraqtl_vllm.names import BACKEND_CLASS, BACKEND_NAME
from fraqtl_vllm.platform.draft_ops import DRAFT_KERNELS, DRAFT_MODULES
from fraqtl_vllm.platform.native_ops import NATIVE_OPS
from fraqtl_vllm.platform.packed_cpu import PackedCpu
from fraqtl_vllm.platform.proposal_ops import PROPOSAL_KERNELS, PROPOSAL_MODULES
from fraqtl_vllm.platform.state_copies import STATE_KERNELS, STATE_MODULES
from fraqtl_vllm.platform.state_ops import STATE_OPS
from fraqtl_vllm.support import choose_backend

STATE_FAMILIES = ("falcon_h1", "granitemoehybrid", "lfm2", "qwen3_next")
"""Hybrid models that were compared with transformers on the same weights, by the model type of their text part."""


def compute_slot_mapping(  # noqa: PLR0917 (vLLM's order)
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    block_table_stride: int,
    slot_mapping: Tensor,
    block_size: int,
    context_parallel_size: int,
    context_parallel_rank: int,
    interleave_size: int,
    pad_id: int,
    triton_block: int,
) -> None:
    """slot = block_table[request, position // block size] · block size + position % block size.

    The arguments are those of vLLM's `ComputeSlotMappingKernel.kernel`, in its order; slots past
    the batch become `pad_id`.
    """
    starts = query_start_loc.long()
    count = int(starts[-1])
    request = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    position = positions[:count]
    block = block_table[request, position // block_size].long()
    slot_mapping[:count] = block * block_size + position % block_size
    slot_mapping[num_tokens:max_num_tokens] = pad_id


class CpuWithoutNativeOps(PackedCpu):
    """See the module's docstring. Active only where `plugin.platform` finds no other platform."""

    serves_drafts = True

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not None and selected_backend.name != BACKEND_NAME:
            raise UnsupportedError(
                f"--attention-backend {selected_backend.name} needs a GPU: on this machine choose {BACKEND_NAME}"
            )
        return BACKEND_CLASS

    @classmethod
    def opaque_attention_op(cls) -> bool:
        """Nothing is compiled, so nothing has to be hidden from a compiler: layers call attention as a function."""
        return False

    @classmethod
    def import_kernels(cls) -> None:
        native_ops()

    @classmethod
    def check_and_update_config(cls, vllm_config: _vllm.VllmConfig) -> None:
        choose_backend(vllm_config)
        super().check_and_update_config(vllm_config)
        check_states(vllm_config.model_config)
        check_weights(vllm_config)
        cls.configure_packed(vllm_config)
        if vllm_config.attention_config.backend is None:
            vllm_config.attention_config.backend = _vllm.AttentionBackendEnum[BACKEND_NAME]
        vllm_config.compilation_config.custom_ops = ["none"]
        vllm_config.compilation_config.mode = _vllm.CompilationMode.NONE
        if vllm_config.parallel_config.world_size == 1:
            vllm_config.parallel_config.distributed_executor_backend = "uni"
        else:
            _bind_ranks_to_cores(vllm_config.parallel_config.world_size)

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        replace_kernels()


def check_states(model: Any) -> None:
    """Raises UnsupportedError for a hybrid model with layers that there are no operators for. model: ModelConfig."""
    if model is None or not model.is_hybrid:
        return
    family = model.hf_text_config.model_type
    if family not in STATE_FAMILIES:
        raise UnsupportedError(
            f"hybrid models such as this {family} need a GPU or vLLM's CPU build: without them choose one of "
            f"{', '.join(STATE_FAMILIES)}"
        )


@cache
def native_ops() -> torch.library.Library:
    """The library of torch versions, which lives as long as the process; vLLM asks for it many times."""
    library = torch.library.Library("_C", "FRAGMENT")
    for schema, function in (NATIVE_OPS | STATE_OPS).items():
        library.define(schema)
        library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
    return library


@cache
def replace_kernels() -> None:
    """Once in a process; vLLM asks for it with every worker."""
    kernels = {
        "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping,
        **STATE_KERNELS,
        **DRAFT_KERNELS,
        **PROPOSAL_KERNELS,
    }
    homes = ("vllm.v1.worker.block_table", *STATE_MODULES, *DRAFT_MODULES, *PROPOSAL_MODULES)
    with _vllm.scan_of_vllm_only(*homes):
        _vllm.register_kernels(kernels)


def _bind_ranks_to_cores(world_size: int) -> None:
    """Share the machine's cores among the ranks; vLLM's automatic split wants a NUMA node for each."""
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") != "auto":
        return
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // world_size)
    groups = [cores[(rank * share) % len(cores) :][:share] for rank in range(world_size)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, group)) for group in groups)
