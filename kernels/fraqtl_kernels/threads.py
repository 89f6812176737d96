"""Small work on several cores: whole pieces side by side instead of every operation shared.

torch shares each operation on the CPU among all its threads and waits for the last of them. Where operations are small
and the cores have other work too, most of the time goes by in these waits: the attention of a calibration prompt took
1.0 to 1.9 s a layer on two busy cores, 0.06 s on one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context, torch's operations in this thread stay on its core. Other threads are not concerned."""
    before = torch.get_num_threads()
    _set_threads(1)
    try:
        yield
    finally:
        _set_threads(before)


def in_parallel(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """[function(item) for item in items], every item on a core, as many at once as torch uses threads.

    For work on the CPU. Inference mode is as outside. Raises what `function` raises first.
    """
    workers = min(torch.get_num_threads(), len(items))
    inference = torch.is_inference_mode_enabled()

    def call(item: In) -> Out:
        with torch.inference_mode(inference):
            return function(item)

    with one_thread():
        if workers < 2:
            return [call(item) for item in items]
        # Threads that are new take their number from `one_thread` too, but only before their first operation
        with ThreadPoolExecutor(workers, "fraqtl", _set_threads, (1,)) as pool:
            return list(pool.map(call, items))


def _set_threads(count: int) -> None:
    """torch.set_num_threads, which vLLM replaces in its CPU workers by a function that only warns."""
    torch._C.set_num_threads(count)
