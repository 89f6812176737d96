"""Compiled work on several cores, by the threads that torch's operations run on.

A function that Numba compiles with `nogil` lets go of the interpreter's lock, and a parallel version of it would take
Numba longer to compile than the function itself. Threads of one's own won't do beside torch: between two operations
its threads wait by spinning, on the cores that ours would need.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from itertools import pairwise

from numba import get_num_threads

from fraqtl_kernels.cpu.kernels.team import register
from fraqtl_kernels.threads import openmp

HAS_TEAMS = register(openmp())
_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_team_of: int | None = None  # the process whose threads they are; a forked child waits for them for ever


def share(run: Callable[[int, int], None], parts: int) -> None:
    """run(begin, end) over parts 0 .. parts - 1, in as many even pieces as `team_size` says.

    Raises what one of them raises.
    """
    threads = team_size(parts)
    pieces = iter(list(pairwise(parts * i // threads for i in range(threads + 1))))
    failed: list[BaseException] = []

    def take(_data: int | None) -> None:
        """What every thread of the team runs; it may have fewer of them than asked for."""
        try:
            for begin, end in pieces:
                run(begin, end)
        except BaseException as error:
            failed.append(error)

    if threads == 1:
        take(None)
    else:
        openmp().GOMP_parallel(_Region(take), None, threads, 0)
    if failed:
        raise failed[0]


def team_size(parts: int) -> int:
    """How many threads a call may take for so many parts: as many as Numba has.

    1 where torch's OpenMP library isn't found, and in a child that was forked after its parent was told more.
    """
    global _team_of
    threads = max(1, min(get_num_threads(), parts))
    if threads == 1 or not HAS_TEAMS or _team_of not in (None, os.getpid()):
        return 1
    _team_of = os.getpid()
    return threads
