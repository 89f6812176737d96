"""What is compiled before a first run on a GPU: the kernels of both forms of decoding, and what they need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Launches are noted in the place of Triton's compiler. Not in this process: here Triton is an interpreter.
LIST_LAUNCHES = """
from triton.runtime.jit import JITFunction
from fraqtl_bench import tune
from fraqtl_bench.gpu import precompile
launched = []
JITFunction.run = lambda self, *args, **options: launched.append(self.fn.__name__)
for job in precompile.jobs():
    if job[1] == tune.SHAPES[0]:
        launched.clear()
        assert precompile.compile_job(job, 90) is None
        print(job[2] is not None and job[2].tuning().transposed, *launched)
"""


def test_both_forms_are_compiled_with_what_they_need() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LIST_LAUNCHES]
    lines = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    assert set(lines) == {
        "False write_kernel attend_kernel combine_kernel",
        "True write_kernel prepare_kernel attend_columns_kernel combine_kernel",
    }
    assert sum(line.startswith("True") for line in lines) >= 4 + 2 * 5  # and what is tried on top of the best
