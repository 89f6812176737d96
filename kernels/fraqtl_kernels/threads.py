"""Small work on several cores: whole pieces side by side instead of every operation shared.

torch shares each operation on the CPU among all its threads and waits for the last of them. Where operations are small
and the cores have other work too, most of the time goes by in these waits: the attention of a calibration prompt took
1.0 to 1.9 s a layer on two busy cores, 0.06 s on one of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def in_parallel(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """[function(item) for item in items], every item on a core, as many at once as torch uses threads.

    For work on the CPU. Inference mode is as outside. Raises what `function` raises first. Where torch has an OpenMP
    library of its own that isn't found, items come one after another.
    """
    library = openmp()
    if library is None:
        return [function(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def begin() -> None:
        torch.get_num_threads()  # a thread's first question to torch sets its number; then it is ours to set
        library.omp_set_num_threads(1)

    def call(item: In) -> Out:
        with torch.inference_mode(inference):
            return function(item)

    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(items))), "fraqtl", begin) as pool:
        return list(pool.map(call, items))


@cache
def openmp() -> Any:
    """The OpenMP library that torch runs on, or None.

    torch.set_num_threads won't do: it also tells the matrix library, in the whole process and for good, to share
    products where they are shared already, and torch's attention on two cores takes seven times as long from then on.
    """
    folder = Path(torch.__file__).parent / "lib"
    paths = [path for name in ("libgomp", "libomp", "libiomp") for path in sorted(folder.glob(f"{name}*.so*"))]
    return ctypes.CDLL(str(paths[0])) if paths else None
