"""`fraqtl-serve doctor`: what is installed, what would run, and what is wrong, in plain words."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from fraqtl_vllm import compat
from fraqtl_vllm.platform.distribution import VLLM_NAMES

PACKAGES = ("fraqtl-serve", "vllm", "torch", "triton", "transformers", "fastapi", "pydantic", "numba")
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.endpoint_plugins")


@dataclass
class Report:
    python: str
    machine: str
    cores: int
    packages: dict[str, str | None]
    vllm_distribution: str | None = None
    platform: str | None = None
    gpu: str | None = None
    backend: str | None = None
    kernel_cache: str | None = None
    problems: list[str] = field(default_factory=list)


def examine() -> Report:
    """Look at this installation without starting an engine."""
    report = Report(
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        packages={name: _version(name) for name in PACKAGES},
    )
    for name in VLLM_NAMES:
        if report.vllm_distribution is None and (version := _version(name)):
            report.vllm_distribution, report.packages["vllm"] = name, version
    _examine_packages(report)
    if report.packages["vllm"] and report.packages["torch"]:
        _examine_platform(report)
    return report


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine_packages(report: Report) -> None:
    vllm, torch = report.packages["vllm"], report.packages["torch"]
    if vllm is None:
        report.problems.append(
            f"vLLM is not installed: pip install vllm=={compat.DEFAULT_VERSION}, or run make serve in a checkout"
        )
    elif (sentence := compat.not_supported(vllm)) is not None:
        report.problems.append(sentence)
    if torch and "+cpu" in torch and _version("torchvision"):
        report.problems.append(
            "torchvision is installed beside the CPU build of torch and breaks transformers: pip uninstall torchvision"
        )
    for group in GROUPS:
        if not any(p.name == "fraqtl" for p in entry_points(group=group)):
            report.problems.append(f"entry point {group}: fraqtl is missing: install this package with pip")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "fraqtl" not in allowed.split(","):
        report.problems.append("VLLM_PLUGINS leaves fraqtl out: plain `vllm serve` will not load it")


def _examine_platform(report: Report) -> None:
    try:
        from vllm.platforms import current_platform

        report.platform = type(current_platform).__name__
        if current_platform.is_cuda_alike():
            report.gpu = current_platform.get_device_name()
            report.backend = "FRAQTL, on the GPU (this version has not run on one yet)"
        elif current_platform.is_cpu():
            _examine_cpu_platform(report, type(current_platform))
            _examine_kernel_cache(report)
        else:
            report.problems.append(f"platform {report.platform} is not supported: a CPU or a CUDA GPU is needed")
    except Exception as error:
        report.problems.append(f"vLLM can't be imported: {error}")


def _examine_kernel_cache(report: Report) -> None:
    """Where the CPU's kernels are kept once they are compiled."""
    logger = logging.getLogger("fraqtl_kernels")
    logger.disabled = True  # what it would say is said here
    try:
        from fraqtl_kernels.numba_cache import kernel_cache

        cache = kernel_cache()
    except Exception as error:
        report.problems.append(f"the CPU's kernels can't be imported: {error}")
        return
    finally:
        logger.disabled = False
    report.kernel_cache = str(cache.folder)
    if cache.is_temporary:
        report.problems.append(str(cache))


def _examine_cpu_platform(report: Report, platform_class: type) -> None:
    from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps
    from fraqtl_vllm.platform.packed_cpu import PackedCpu

    if issubclass(platform_class, CpuWithoutNativeOps):
        report.backend = "FRAQTL, on the CPU, with torch versions of vLLM's native operators, for whatever is served"
    elif issubclass(platform_class, PackedCpu):
        report.backend = "FRAQTL, on the CPU, with vLLM's native operators, where it is asked for"
    elif os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        report.problems.append("VLLM_TARGET_DEVICE=cpu keeps vLLM from asking platform plugins: unset it")
    else:
        report.problems.append(f"vLLM runs on {report.platform}, which has no FRAQTL: another plugin is in the way")


def print_report(*, as_json: bool) -> int:
    """Print the report; returns the exit status, 1 if anything is wrong."""
    report = examine()
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print_text(report)
    return 1 if report.problems else 0


def _installed(name: str, report: Report) -> str:
    version = report.packages[name] or "not installed"
    if name == "vllm" and report.vllm_distribution not in (None, name):
        return f"{version} ({report.vllm_distribution})"
    return version


def _print_text(report: Report) -> None:
    lines: list[tuple[str, Any]] = [
        ("Python", f"{report.python} on {report.machine}, {report.cores} cores"),
        *((name, _installed(name, report)) for name in report.packages),
        ("platform", report.platform or "none"),
        ("GPU", report.gpu or "none"),
        ("attention backend", report.backend or "none"),
        ("compiled kernels", report.kernel_cache or "none"),
    ]
    for name, value in lines:
        print(f"{name:18} {value}")
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if not report.problems:
        print("no problems found")
