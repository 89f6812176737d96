"""A stop that comes while the server starts is obeyed at once.

vLLM's front end waits for its engine in a block that takes a KeyboardInterrupt for the end of the wait
(`zmq_socket_ctx`), so a SIGTERM is lost there; asyncio puts a Ctrl-C off until the wait is over; and an engine that
loads a model or calibrates only notes that it was told to end. Here both signals end that wait and the engine.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import psutil

from fraqtl_serve.engine import hooks

EXIT_SECONDS = 2
# multiprocessing's tracker speaks after everybody else, of what processes that were killed have left for it to remove.
TRACKER_SAYS_NOTHING = "ignore:resource_tracker:UserWarning"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(SystemExit):
    """Raised by a signal; its code is what a shell shows for a process that the signal ended."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def leave(stop: StoppedError) -> NoReturn:
    """End this process in one line and without taking all that was imported down piece by piece: that takes seconds."""
    print(f"fraqtl-serve: stopped by {stop.signal.name} while it started", file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + stop.signal)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(number: int, frame: FrameType | None) -> None:
    for one in SIGNALS:  # once is enough: what follows must not be interrupted
        signal.signal(one, signal.SIG_IGN)
    raise StoppedError(number)


@contextmanager
def stoppable_start() -> Iterator[None]:
    """While vLLM's `serve` runs in this block, a signal that comes before its engine is ready ends the start."""
    from fraqtl_serve._vllm import engine_utils

    sys.warnoptions.append(TRACKER_SAYS_NOTHING)  # handed on to the processes that are started
    original = engine_utils.wait_for_engine_startup

    def wait_for_engine_startup(*arguments: Any) -> None:
        before = {one: signal.signal(one, _stop) for one in SIGNALS}
        try:
            original(*arguments)
        except StoppedError:
            kill(arguments[-1].engine_manager)
            raise
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {exit_codes(arguments[-1].engine_manager)}") from error
        for one, handler in before.items():
            signal.signal(one, handler)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # asyncio replaces that one, and no other, by one that waits
        signal.signal(signal.SIGINT, _interrupt)
    with hooks.START.put_for_now(engine_utils, wait_for_engine_startup):
        yield


def exit_codes(engine_manager: Any) -> dict[str, int | None]:
    """Of this machine's engines. One that was killed is seen to have ended a moment before it has its code."""
    engines = getattr(engine_manager, "processes", ())
    for engine in engines:
        engine.join(EXIT_SECONDS)
    return {engine.name: engine.exitcode for engine in engines}


def kill(engine_manager: Any) -> None:
    """End the engines of this machine and their workers; they have nothing yet that could be lost."""
    for engine in getattr(engine_manager, "processes", ()):
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(engine.pid)
            for one in [family, *family.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
