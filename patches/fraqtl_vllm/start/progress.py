"""What a start is doing, for the person who waits for it: one line a step, on stderr, with the seconds since it began.

`fraqtl-serve serve` asks for these lines through the environment, which every process of the server inherits. Where
nobody has (`vllm serve`, `LLM(...)`, `--quiet`), what is said here goes to vLLM's log at INFO.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

SWITCH = "FRAQTL_START_TIME"  # when the start began, in seconds since 1970; unset: no lines
SECONDS_BETWEEN = 5.0  # two lines of one count where stderr is a file

logger = logging.getLogger("vllm.fraqtl.start")


def begin() -> None:
    """Ask for lines, in this process and those that it starts."""
    os.environ[SWITCH] = f"{time.time():.3f}"


def say(text: str) -> None:
    """One line: what begins now, or what has been found. Of several ranks only the first speaks."""
    if not _is_first_rank():
        return
    if SWITCH in os.environ:
        print(_line(text), file=sys.stderr, flush=True)
    else:
        logger.info("%s", text)


@cache
def say_once(text: str) -> None:
    """`say`, the first time that this process comes here."""
    say(text)


@contextmanager
def if_slow(text: str, seconds: float = 1.0) -> Iterator[None]:
    """Say what goes on inside only if it takes longer: kernels that have to be compiled and not read back, say."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def counted(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """For a step of `total` parts: gives a function to call with the number that are done.

    A terminal shows one line that counts up; a file gets a line now and then.
    """
    last = time.monotonic()
    rewrites = SWITCH in os.environ and sys.stderr.isatty() and _is_first_rank()

    def done(parts: int) -> None:
        nonlocal last
        if rewrites:
            print(f"\r{_line(text)}: {parts} of {total}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - last >= SECONDS_BETWEEN and parts < total:
            last = time.monotonic()
            say(f"{text}: {parts} of {total}")

    if rewrites:
        done(0)
    else:
        say(text)
    try:
        yield done
    finally:
        if rewrites:
            print(file=sys.stderr, flush=True)


def _is_first_rank() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported for this: the command line speaks before torch is
    return distributed is None or not distributed.is_initialized() or distributed.get_rank() == 0


def _line(text: str) -> str:
    return f"[{time.time() - float(os.environ[SWITCH]):5.1f} s] {text}"
