"""Result files: what every one of them says about the machine and the command that made it."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
PACKAGES = ("fraqtl-serve", "vllm", "torch", "triton", "flashinfer-python", "transformers", "numba")


def provenance() -> dict[str, Any]:
    """Command, time, machine and versions."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": " ".join(["fraqtl-bench", *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def gpu() -> dict[str, Any]:
    """Name, memory and driver of the first GPU."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def save(path: Path, results: dict[str, Any], quiet: bool = False) -> None:
    """Write provenance and `results` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**provenance(), **results}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    if not quiet:
        print(f"written to {path}")
