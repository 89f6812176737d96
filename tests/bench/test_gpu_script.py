"""`bench/gpu.sh` without a GPU: a stand-in for Python shows what would run, and that failures stop nobody."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path

from fraqtl_bench.cli import COMMANDS
from fraqtl_bench.kernels.registry import arms_for

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"
STAND_IN = """#!/bin/bash
echo "called: $*"
[[ "$*" != *--errors* ]]
"""


def run(folder: Path, *steps: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    settings = {**os.environ, "PYTHON": str(python), **environment}
    return subprocess.run(["bash", SCRIPT, folder / "out", *steps], env=settings, capture_output=True, text=True)


def test_a_failed_step_stops_nobody(tmp_path: Path) -> None:
    done = run(tmp_path, "errors", "grid", "nonsense", "texts_packed")
    assert done.returncode == 1
    assert "failed: errors nonsense" in done.stdout and "unknown step nonsense: choose from machine" in done.stderr
    steps = [line.split("\t") for line in (tmp_path / "out" / "steps.tsv").read_text().splitlines()]
    assert [(name, status) for name, _, status in steps] == [
        ("errors", "exit 1"),
        ("grid", "exit 0"),
        ("texts_packed", "exit 0"),
    ]
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as tar:
        assert {"./errors.log", "./grid.log", "./texts_packed.log"} <= set(tar.getnames())
    assert "fraqtl_bench.cli kernels --device cuda" in (tmp_path / "out" / "grid.log").read_text()


def test_steps_without_time_left_are_not_started(tmp_path: Path) -> None:
    done = run(tmp_path, "grid", MINUTES="0")
    assert done.returncode == 1 and "no time left" in done.stdout
    assert not (tmp_path / "out" / "grid.log").exists()


def test_all_went_well(tmp_path: Path) -> None:
    done = run(tmp_path, "grid", "tests")
    assert done.returncode == 0 and "all steps passed" in done.stdout


def test_no_folder() -> None:
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: bench/gpu.sh RESULTS_FOLDER" in done.stderr


def test_arms_and_commands_exist() -> None:
    text = SCRIPT.read_text().replace("\\\n", " ")
    known = arms_for("cuda")
    named = [
        arm for line in re.findall(r"--arms ([^\n]*)", text) for arm in line.split() if not arm.startswith(("-", '"'))
    ]
    assert len(named) > 10 and [arm for arm in named if arm not in known] == []
    commands = {module.__name__.rsplit(".", 1)[-1].replace("_", "-") for module in COMMANDS}
    used = re.findall(r"^\s+bench \w+ \d+ ([\w-]+) ", text, re.MULTILINE)
    assert len(used) == 8 and set(used) <= commands
