"""Kernels compiled for GPUs that aren't here: nothing spills, the unpack is inline PTX, no product is TF32.

FRAQTL_AOT=all compiles every variant for every architecture; without it the default format on the
main head sizes for sm_90, and the committed table is checked for the rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fraqtl_kernels.gpu import aot

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "aot" / "registers.json"
READING = ("decode", "prefill")  # kernels that unpack codes into products


def check(usage: dict[str, Any]) -> None:
    kernel, name = usage["variant"].split("-")[:2]
    size = int(usage["variant"].split("-D")[1].split("-")[0])
    assert not usage["tf32"], usage
    if size in aot.MAIN_HEAD_SIZES:
        assert usage["spills"] == 0, usage
    if kernel in READING and name == "k4v4":
        assert usage["unpack"], usage


@pytest.mark.skipif(not RESULTS.exists(), reason="no table of compiled kernels in this checkout")
def test_the_committed_table() -> None:
    usages = json.loads(RESULTS.read_text())["usages"]
    for usage in usages:
        check(usage)
    names = {v.name for v in aot.variants()}
    assert {u["variant"] for u in usages} <= names  # none of a variant that no longer exists


def test_compile_now(tmp_path: Path) -> None:
    """In a process of its own: this one has the interpreter switched on."""
    every = os.environ.get("FRAQTL_AOT") == "all"
    options = [] if every else ["--quick", "--architectures", "90"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fraqtl_kernels.gpu.aot", "--out", str(tmp_path), *options]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    usages = json.loads((tmp_path / "registers.json").read_text())["usages"]
    assert len(usages) >= 16
    for usage in usages:
        check(usage)
