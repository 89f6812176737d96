"""Triton kernels run in Triton's interpreter here, which must be chosen before Triton is imported.

Set FRAQTL_TEST_DEVICE=cuda to run the same tests, compiled, on a GPU.
"""

from __future__ import annotations

import os

import pytest

DEVICE = os.environ.get("FRAQTL_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import triton  # noqa: F401
except ImportError:  # every test of the folder needs it
    collect_ignore_glob = ["test_*.py"]

    def pytest_report_header() -> str:
        return "GPU kernels: not tested, Triton is not installed"


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> object:
    import torch

    return getattr(torch, request.param)
