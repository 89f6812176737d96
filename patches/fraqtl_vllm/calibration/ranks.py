"""What the ranks of an engine decide together, and engines beside each other leave to one of them.

All ranks of an engine run the model together, so all of them calibrate or none does. Engines beside each other (data
parallelism, servers that start at once) calibrate one after the other, and all but the first read what the first wrote.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fraqtl_vllm import _vllm
from fraqtl_vllm.start import progress

LONGEST_WAIT = 600.0  # seconds; who calibrates longer than that is stuck
POLL = 0.1

logger = _vllm.init_logger("vllm.fraqtl.calibration")


def on_all(holds: bool) -> bool:
    """Whether it holds on every rank. All ranks have come here when this returns."""
    return _reduced(_vllm.get_world_group(), int(holds), torch.distributed.ReduceOp.MIN) == 1


def over_stages(number: int) -> int:
    """The sum of a number over the pipeline stages."""
    return int(_reduced(_vllm.get_pp_group(), number, torch.distributed.ReduceOp.SUM))


def largest(number: float) -> float:
    """Of all ranks."""
    return _reduced(_vllm.get_world_group(), number, torch.distributed.ReduceOp.MAX)


def is_first() -> bool:
    """Whether this is the rank that speaks for all."""
    return bool(_vllm.get_world_group().is_first_rank)


def _reduced(group: Any, number: float, operation: Any) -> float:
    if group.world_size == 1:
        return number
    value = torch.tensor([number], dtype=torch.float64)
    torch.distributed.all_reduce(value, operation, group=group.cpu_group)
    return float(value.item())


@contextmanager
def one_engine_at_a_time(folder: Path, longest: float = LONGEST_WAIT) -> Iterator[bool]:
    """Tells whether this engine had to wait for another one: then the file may be there now.

    Its first rank holds a lock on `folder` meanwhile, which ends with its process. Where a folder can't be locked, or
    after `longest` seconds, nobody waits: files are written whole or not at all, so that costs time only.
    """
    if _vllm.get_world_group().rank_in_group:
        yield not on_all(True)
        return
    handle = _opened(folder)
    try:
        has_waited = handle is not None and _lock(handle, folder, longest)
        yield not on_all(not has_waited)
    finally:
        if handle is not None:
            os.close(handle)


def _opened(folder: Path) -> int | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder, os.O_RDONLY)
    except OSError:
        return None  # saving will say it


def _lock(handle: int, folder: Path, longest: float) -> bool:
    """Whether that took any time."""
    begin = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - begin > longest:
                logger.warning("Another process has kept %s locked for %.0f s: not waiting any longer", folder, longest)
                return True
            progress.say_once("waiting for another engine, which calibrates the KV cache")
            time.sleep(POLL)
        except OSError:
            return False  # a file system without locks
        else:
            return time.monotonic() - begin >= POLL
