"""What the server that engine runs are forked from has done: what every process of vLLM does first."""

import gc

from vllm.plugins import load_general_plugins

load_general_plugins()

import numba.typed  # noqa: E402, F401
import vllm.entrypoints.llm  # noqa: E402, F401
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors  # noqa: E402, F401
import vllm.model_executor.layers.quantization.online.base  # noqa: E402, F401
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import fraqtl_kernels.cpu.attention  # noqa: E402, F401
import fraqtl_vllm.calibration.worker  # noqa: E402, F401

gc.collect()
gc.freeze()  # vLLM collects again and again, which takes seconds with so many modules
