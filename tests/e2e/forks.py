"""Processes forked from a server that has imported vLLM and done nothing else: importing takes most of a small run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
SECONDS = 590  # less than pytest gives a test
ENDING = 20  # seconds, once the answer is there
_terminal = 2  # where stderr of this process goes, whatever its log is


class ProcessError(Exception):
    """It ended without an answer, or gave none in time."""


def in_process(log: Path, function: Callable[..., T], *arguments: Any, **environment: str) -> T:
    """function(*arguments) in a process of its own, with our environment and this besides; what it says goes to `log`.

    Raises ProcessError, and its log says why.
    """
    theirs = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    receiving, sending = _context().Pipe(duplex=False)
    work = (sending, log, theirs | ENVIRONMENT | environment, function, arguments)
    process = _context().Process(target=_run, args=work)
    process.start()
    sending.close()
    try:
        if not receiving.poll(SECONDS):
            raise ProcessError(f"no answer in {SECONDS} seconds, see {log}")
        answer: T = pickle.loads(receiving.recv_bytes())
        process.join(ENDING)
        return answer
    except EOFError:
        raise ProcessError(f"it ended without an answer, see {log}") from None
    finally:
        process.kill()
        process.join()


class ForkedProcess:
    """A forked process, used like a subprocess.Popen."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self._process.exitcode

    def send_signal(self, sig: int, /) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, sig)


def launch(command: list[str], log: Path, environment: dict[str, str]) -> ForkedProcess:
    """`python command`, in a process group of its own; what it says goes to `log`. command: begins with -m."""
    process = _context().Process(target=_run_module, args=(command[1:], log, environment))
    process.start()
    return ForkedProcess(process)


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


def _fork_workers() -> None:
    """vLLM spawns its engine and workers, and each imports it anew. Here nothing has used OpenMP or a GPU yet."""
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]


def _settle(log: Path, environment: dict[str, str]) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    _fork_workers()


def _run_module(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """What `python -m` does, in a session of its own."""
    os.setsid()
    _settle(log, environment)
    # A signal to the engine would wake the event loop of the API server, which it is forked from.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    sys.argv = arguments.copy()
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _run(
    sending: Connection, log: Path, environment: dict[str, str], function: Callable[..., T], arguments: Sequence[Any]
) -> None:
    global _terminal
    _terminal = os.dup(2)
    _settle(log, environment)
    answer = function(*arguments)
    sys.stdout.flush()
    sending.send_bytes(pickle.dumps(answer))  # send() would leave tensors in memory that ends with this process
