"""Before anything imports torch or Triton, which read these when they load.

Triton's interpreter runs the GPU kernels here. Threads of torch that have nothing to do sleep instead of spinning on
cores where other tests and their servers run.

FRAQTL_TEST_DEVICE=cuda runs the same tests, compiled, on a GPU. Servers and engines that tests start
don't inherit the switch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("FRAQTL_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


HERE = Path(__file__).parent
TIERS = {
    "e2e": ("e2e/",),
    "interpreter": ("kernels/gpu/", "patches/test_cuda_attention.py"),
    "mutation": ("kernels/gpu/test_mutations.py",),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a test lies says its tier; what is slow says so itself."""
    for item in items:
        place = item.path.relative_to(HERE).as_posix()
        for tier, begins in TIERS.items():
            if place.startswith(begins):
                item.add_marker(tier)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test sets for a server that it starts in this process must not reach the engines of later tests."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
