"""Compiled work shared among the threads of torch's OpenMP library."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from numba import get_num_threads

from fraqtl_kernels.cpu import share as share_module
from fraqtl_kernels.cpu.share import share


@pytest.fixture(params=["a team", "a team of one", "no library"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no library":
        monkeypatch.setattr(share_module, "HAS_TEAMS", False)
    elif request.param == "a team of one":  # OpenMP gives as many threads as it sees fit
        alone = SimpleNamespace(GOMP_parallel=lambda take, data, _threads, _flags: take(data))
        monkeypatch.setattr(share_module, "openmp", lambda: alone)
    return str(request.param)


@pytest.mark.parametrize("parts", [1, 2, 3, 17])
def test_every_part_is_done_once(team: str, parts: int) -> None:
    done: list[int] = []
    share(lambda begin, end: done.extend(range(begin, end)), parts)
    assert sorted(done) == list(range(parts))


@pytest.mark.skipif(get_num_threads() < 2, reason="needs two threads")
def test_pieces_run_side_by_side() -> None:
    meeting, seen = threading.Barrier(get_num_threads()), set()

    def run(_begin: int, _end: int) -> None:
        meeting.wait(10)  # nobody goes on before all are here
        seen.add(threading.get_ident())

    share(run, 8 * get_num_threads())
    assert len(seen) == get_num_threads()


def test_an_error_comes_out(team: str) -> None:
    def run(begin: int, _end: int) -> Any:
        if begin == 0:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        share(run, 4)
