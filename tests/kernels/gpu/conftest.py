"""Triton kernels run in Triton's interpreter here, or compiled on a GPU: see `tests/conftest.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = os.environ.get("FRAQTL_TEST_DEVICE", "cpu")

# Of what says nothing about a GPU that is there, or can't be said there.
interpreter_only = pytest.mark.skipif(DEVICE != "cpu", reason="only in Triton's interpreter, or for GPUs not here")

try:
    from tests.interpreter import speed_up

    if DEVICE == "cpu":
        speed_up()
except ImportError:  # every test of the folder needs Triton
    collect_ignore_glob = ["test_*.py"]

    def pytest_report_header() -> str:
        return "GPU kernels: not tested, Triton is not installed"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The interpreter's arrays are small: threads of torch only wait for one another, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
