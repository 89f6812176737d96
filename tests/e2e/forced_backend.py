"""Starts an engine that asks for the packed cache and is given something else, for tests of the check at start.

    python -m tests.e2e.forced_backend backend|pool

"backend": the platform gives every layer vLLM's own attention for CPUs, as stock platforms do. "pool": the layers are
ours, and vLLM is told nothing of packed pages. Prints what ended the start, or "served".
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.engine import DEMO_MODEL

STOCK = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


def start_with(forced: str) -> str:
    """The last line of an engine's start in which `forced` was taken from us."""
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.forced_backend", forced],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    lines = done.stdout.strip().splitlines()
    if not lines:
        raise RuntimeError(f"no word from the engine ({done.returncode}):\n{done.stderr[-4000:]}")
    return lines[-1]


def _force(forced: str) -> None:
    from fraqtl_vllm.attention.backend import FraqtlBackend
    from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps

    def stock_backend(*_: Any, **__: Any) -> str:
        return STOCK

    def unpacked(spec: Any) -> Any:
        return spec

    if forced == "backend":
        CpuWithoutNativeOps.get_attn_backend_cls = stock_backend  # type: ignore[method-assign]
    elif forced == "pool":
        FraqtlBackend.customize_spec = unpacked  # type: ignore[method-assign]
    else:
        raise SystemExit(f"forced_backend: {forced!r} is neither backend nor pool")


def _main(forced: str) -> None:
    from vllm import LLM

    _force(forced)
    try:
        LLM(
            model=str(DEMO_MODEL),
            attention_backend="FRAQTL",
            enforce_eager=True,
            max_model_len=512,
            block_size=32,  # the stock attention takes no smaller ones
            kv_cache_memory_bytes=16 << 20,
            additional_config={"fraqtl": {"calibration": False}},
        )
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    else:
        print("served", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
