"""Compiled work on several cores by Python's own threads.

A function that Numba compiles with `nogil` lets go of the interpreter's lock, and a parallel version of it would take
Numba longer to compile than the function itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

from numba import get_num_threads


def share(run: Callable[[int, int], None], parts: int) -> None:
    """run(begin, end) over parts 0 .. parts - 1, in as many even pieces as Numba has threads.

    Raises what one of them raises.
    """
    threads = max(1, min(get_num_threads(), parts))
    edges = [parts * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1, os.getpid()).submit(run, begin, end) for begin, end in pairwise(edges[1:])]
    try:
        run(0, edges[1])
    finally:
        failed = [other.exception() for other in others]  # waits for all: they write where the caller reads
    for error in failed:
        if error is not None:
            raise error


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One for each process: threads don't survive a fork, though their executor does."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fraqtl-kernels")
