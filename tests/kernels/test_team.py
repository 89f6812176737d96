"""Parts of a compiled function on the threads of a team."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numba import njit

from fraqtl_kernels.cpu import share
from fraqtl_kernels.cpu.kernels.team import address_of, in_team

STEP = (
    "from fraqtl_kernels.cpu import share; from fraqtl_kernels.cpu.step import warm_up_step; "
    "print(share.team_size(1)); warm_up_step(); print(share.team_size(9))"
)


@njit(nogil=True)
def note(begin: Any, end: Any, scale: Any, both: Any) -> None:
    begun, done = both
    for part in range(begin, end):
        begun[part] = begin
        done[part] += scale * part


@njit(nogil=True)
def note_all(address: Any, threads: Any, parts: Any, scale: Any, both: Any) -> None:
    in_team(address, threads, parts, (scale, both))


def run(threads: int, parts: int) -> tuple[Any, Any]:
    both = np.full(parts, -1), np.zeros(parts)
    given = np.float64(0.5), both
    note_all(address_of(note, *given), threads, parts, *given)
    return both


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [0, 1, 2, 3, 8, 1000])
def test_every_part_comes_once_in_even_pieces(threads: int, parts: int) -> None:
    begun, done = run(threads, parts)
    assert np.array_equal(done, 0.5 * np.arange(parts))
    sizes = np.unique(begun, return_counts=True)[1]
    assert parts == 0 or sizes.max() - sizes.min() <= 1
    assert len(sizes) == min(threads, parts)


def test_a_team_is_as_large_as_the_work_and_numba_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "_team_of", None)
    monkeypatch.setattr(share, "get_num_threads", lambda: 4)
    assert [share.team_size(parts) for parts in (0, 1, 3, 9)] == [1, 1, 3, 4]
    monkeypatch.setattr(share, "HAS_TEAMS", False)
    assert share.team_size(9) == 1


@njit(nogil=True)
def fail(begin: Any, end: Any, at: Any) -> None:
    for part in range(begin, end):
        if part == at:
            raise ValueError("this part")


@njit(nogil=True)
def fail_all(address: Any, threads: Any, parts: Any, at: Any) -> None:
    in_team(address, threads, parts, (at,))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_part_that_fails_is_heard_of(threads: int) -> None:
    address = address_of(fail, 8)
    for at in (0, 5, 8):
        with pytest.raises(RuntimeError, match="a part of the work failed"):
            fail_all(address, threads, 9, at)
    fail_all(address, threads, 9, 9)


def test_a_step_without_the_openmp_library() -> None:
    """Its names must stand for something, or compiled code can't be loaded."""
    code = "from fraqtl_kernels import threads; threads.openmp = lambda: None; " + STEP
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
