"""Work on several cores: its results, its threads, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from fraqtl_kernels import threads as threads_module
from fraqtl_kernels.threads import in_parallel


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_that_share_no_operation(threads: int) -> None:
    meeting = threading.Barrier(threads)

    def work(item: int) -> tuple[int, int, int]:
        meeting.wait(10)  # so that as many as torch has threads run at once, or none goes on
        return item, torch.get_num_threads(), threading.get_ident()

    found = in_parallel(work, range(2 * threads))
    assert [item for item, _, _ in found] == list(range(2 * threads))
    assert {count for _, count, _ in found} == {1} and len({ident for _, _, ident in found}) == threads
    assert torch.get_num_threads() == threads


def test_inference_mode_is_that_outside(threads: int) -> None:
    def is_inference(_: int) -> bool:
        return torch.ones(1).is_inference()

    with torch.inference_mode():
        assert all(in_parallel(is_inference, range(4)))
    assert not any(in_parallel(is_inference, range(4)))


def test_an_error_comes_out_and_the_threads_are_given_back(threads: int) -> None:
    def work(item: int) -> int:
        if item == 1:
            raise ValueError("no")
        return item

    with pytest.raises(ValueError, match="no"):
        in_parallel(work, range(4))
    assert torch.get_num_threads() == threads


WITHOUT_IT = """
import torch
from fraqtl_kernels.threads import in_parallel

torch._C.set_num_threads = torch.set_num_threads = None  # not to be called
found = in_parallel(lambda n: torch.ones(64, 64) @ torch.ones(64, 64) * n, range(4))
assert [float(x[0, 0]) for x in found] == [0, 64, 128, 192]
"""


def test_torchs_number_is_never_set() -> None:
    """That would slow the attention of the whole process down for good."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_IT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_torchs_library_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "openmp", lambda: None)
    found = in_parallel(lambda item: (item, threading.get_ident()), range(3))
    assert found == [(item, threading.get_ident()) for item in range(3)]
