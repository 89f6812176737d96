"""Parts of a compiled function on the threads of a team."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from fraqtl_kernels.cpu import share
from fraqtl_kernels.cpu.kernels.team import address_of, in_team


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
    monkeypatch.setattr(share, "openmp", lambda: None)
    assert share.team_size(9) == 1
