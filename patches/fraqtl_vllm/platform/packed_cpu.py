"""What our CPU platforms have in common: how vLLM is set up where the packed cache is asked for.

`cpu_platform.CpuWithoutNativeOps` and `native_cpu_platform.NativeCpu` extend it.
"""

from __future__ import annotations

from fraqtl_kernels.pages import BLOCK_SIZE_MULTIPLE
from fraqtl_vllm import _vllm
from fraqtl_vllm._vllm import CpuPlatform
from fraqtl_vllm.stores.support import use_packed_spec
from fraqtl_vllm.support import check_supported

STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
WORKER = "fraqtl_vllm.platform.cpu_worker.FraqtlCpuWorker"
LORA = "fraqtl_vllm.platform.lora.FraqtlPunicaWrapper"


class PackedCpu(CpuPlatform):
    """vLLM's CPU platform with our backend on offer."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return LORA

    @classmethod
    def configure_packed(cls, vllm_config: _vllm.VllmConfig) -> None:
        """Checks and settings of a packed cache, after vLLM's own for a CPU. Raises UnsupportedError.

        Blocks have 16 tokens, as on GPUs, unless the user says otherwise: vLLM's default for CPUs, 128, suits its
        own attention. With ours it would only make prefixes coarser and waste more of a sequence's last block.
        """
        check_supported(vllm_config)
        use_packed_spec(vllm_config)
        if not vllm_config.cache_config.user_specified_block_size:
            vllm_config.cache_config.block_size = BLOCK_SIZE_MULTIPLE
        if vllm_config.parallel_config.worker_cls == STOCK_WORKER:
            vllm_config.parallel_config.worker_cls = WORKER
