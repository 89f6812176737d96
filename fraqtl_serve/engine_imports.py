"""What the fork server of `warm_engine` imports: all that an engine on a CPU needs. Importing this is all it does."""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

from fraqtl_vllm import garbage

# Not Numba: vLLM looks through all loaded modules for kernels of Triton's, and stumbles over llvmlite's.
MODULES = (
    "vllm.v1.engine.core",
    "fraqtl_vllm.cpu_worker",
    "fraqtl_vllm.scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.llama",
)


def import_all() -> None:
    """What can't be imported here the engine will miss itself, and say so."""
    garbage.collect_rarely()
    for name in MODULES:
        with suppress(Exception):
            import_module(name)
    gc.freeze()  # these objects stay: a collection in the engine needn't touch, and so copy, them


import_all()
