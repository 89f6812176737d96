"""One sentence for what ended the start of the server, wherever it happened."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fraqtl_vllm.start import reasons

TRACEBACK_SWITCH = "FRAQTL_TRACEBACK"
HINT = f" ({TRACEBACK_SWITCH}=1 shows where)"
ENGINE_FAILED = "Engine core initialization failed"
WORKER_LOST = "WorkerProc initialization failed"


@contextmanager
def noted_reasons() -> Iterator[None]:
    """Have the processes that are started in this block tell why they failed."""
    try:
        handle, path = tempfile.mkstemp(prefix="fraqtl-start-")
    except OSError:  # nowhere to write: the log above has to do
        yield
        return
    os.close(handle)
    os.environ[reasons.VARIABLE] = path
    try:
        yield
    finally:
        start_is_over()


def start_is_over() -> None:
    """What processes log from now on is no reason why the start failed."""
    path = os.environ.pop(reasons.VARIABLE, None)
    if path is not None:
        with suppress(OSError):
            Path(path).unlink()


def explain(error: Exception, args: argparse.Namespace) -> str:
    """One sentence for an exception that ended the start; inside `noted_reasons`, also for one in another process."""
    said = reasons.known(error)
    if said is not None:
        return said
    for cause in reasons.chain(error):
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            return f"port {args.port} is taken: choose another with --port"
        if ENGINE_FAILED in str(cause):
            return _of_engine(str(cause))
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{HINT}"


def _of_engine(message: str) -> str:
    """What the engine's processes noted, or what their exit codes tell."""
    path = os.environ.get(reasons.VARIABLE)
    noted = reasons.read(Path(path)) if path else None
    if noted is not None and WORKER_LOST not in noted:
        return noted
    killed = next((-int(code) for code in re.findall(r": (-\d+)", message)), 0)
    if killed == signal.SIGKILL or noted is not None:
        return (
            "a process of the engine was killed while it started, mostly because the machine's memory, or that which "
            "the container may use, ran out: choose a smaller model or give less with --kv-cache-memory-bytes"
        )
    if killed:
        return f"the engine's process was ended by {signal.Signals(killed).name} while it started"
    return "the engine did not start; the reason stands in its log above" + HINT
