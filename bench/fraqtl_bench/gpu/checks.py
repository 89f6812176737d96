"""The first seconds of a run: what machine this is, and whether the kernels compute what they should at all.

python -m fraqtl_bench.gpu.checks machine|decode --out FILE [--device cpu]
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fraqtl_bench import results
from fraqtl_bench.kernels import _vllm
from fraqtl_bench.kernels.arms import errors_of
from fraqtl_bench.kernels.cuda_arms import PackedOnGpu
from fraqtl_bench.kernels.shapes import Inputs, Shape
from fraqtl_bench.kernels.timing import copy_ceiling
from fraqtl_kernels.formats import FORMATS

LARGEST_ERROR = 1e-2
SHAPES = {"cuda": "3x4100x32x8x128", "cpu": "2x33x4x2x64"}  # the last block and the last tile aren't full


def machine(device: str) -> dict[str, Any]:
    """What is here: the GPU, a copy's speed, flash attention."""
    if device == "cuda":
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout, flush=True)
    found: dict[str, Any] = {"gpu": results.gpu()} if device == "cuda" else {}
    try:
        flash = _vllm.flash_attention()
        found["flash_attention_3"] = _vllm.fa3_unavailable(flash) or "can run"
    except ImportError as error:
        found["flash_attention_3"] = str(error)
    tools = ("pytest", "xdist", "pytest_timeout", "rich", "triton")
    found["missing"] = [name for name in tools if not _importable(name)]
    return found | {"copy_bytes_per_s": copy_ceiling(device)}


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def decode(device: str) -> dict[str, Any]:
    """Errors of one write and one decode step per format. Ends with status 1 if one is wrong."""
    found: dict[str, Any] = {}
    inputs = Inputs.random(Shape.parse(SHAPES[device]), 16, 0, torch.device(device))
    for name in ("bf16", "k8v8", "k4v4", "k3v3"):
        found[name] = errors_of(PackedOnGpu(FORMATS[name]).prepare(inputs), inputs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("machine", "decode"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = machine(args.device) if args.what == "machine" else decode(args.device)
    results.save(args.out, {args.what: found})
    print(found, flush=True)
    if args.what == "decode":
        wrong = [name for name, errors in found.items() if not errors["kernel_error"] < LARGEST_ERROR]  # nor NaN
        if wrong:
            sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
