"""Processes forked from a server that has imported vLLM and done nothing else: importing takes most of a small run."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

_terminal = 2  # where stderr of this process goes, whatever its log is


def in_process(log: Path, function: Callable[..., T], *arguments: Any, **environment: str) -> T:
    """function(*arguments) in a process of its own, with our environment and this besides; what it says goes to `log`.

    Raises what it raises, and BrokenProcessPool if it dies.
    """
    theirs = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(_run, log, theirs | ENVIRONMENT | environment, function, arguments).result()


def say(text: str) -> None:
    """On the terminal, also from such a process."""
    os.write(_terminal, f"{text}\n".encode())


@cache
def _context() -> ForkServerContext:
    """Its server starts now: what the kernel tests set in this process must not reach it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.imported"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        os.environ.pop("TRITON_INTERPRET", None)
        forkserver.ensure_running()
    return context


def _run(log: Path, environment: dict[str, str], function: Callable[..., T], arguments: Sequence[Any]) -> T:
    global _terminal
    _terminal = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    return function(*arguments)
