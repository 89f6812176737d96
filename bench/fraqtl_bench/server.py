"""Starts, waits for and stops a real `fraqtl-serve serve`, in a process group of its own.

Each has a folder for its log below the temporary one. `running` removes it if all went well; FRAQTL_KEEP_LOGS=1
keeps them all.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

STOCK_SERVER = ("vllm.entrypoints.cli.main", "serve")  # to start with VLLM_PLUGINS empty
PORTS = range(20000, 32000)  # below those of Linux's connections, see ip_local_port_range
START_SECONDS = float(os.environ.get("FRAQTL_START_SECONDS", "180"))  # more where many programs share few cores


class Process(Protocol):
    """What is used of a subprocess.Popen."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...


Launch = Callable[[list[str], Path, dict[str, str]], Process]


@dataclass
class Server:
    url: str
    process: Process
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


def free_port() -> int:
    """One that the kernel gives to no connection, which could take it before the server that is started does."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def popen(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The process of `python command`, in a group of its own; what it says goes to `log`."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def start(
    *arguments: str,
    port: int | None = None,
    environment: dict[str, str] | None = None,
    module: tuple[str, ...] = ("fraqtl_serve", "serve"),
    log_level: str | None = "INFO",
    launch: Launch = popen,
) -> Server:
    """Start a server, on a free port if none is given, in a process group of its own; does not wait for it.

    module: what to run with `python -m`, and its first arguments. log_level: vLLM's; None for what users see.
    launch: makes the process of Python's arguments, the log and the environment.
    """
    port = port or free_port()
    log = Path(tempfile.mkdtemp(prefix="fraqtl-server-")) / "server.log"
    command = ["-m", *module, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    env.pop("TRITON_INTERPRET", None)  # a caller's, that tests kernels beside
    if log_level is None:
        env.pop("VLLM_LOGGING_LEVEL", None)
    else:
        env.setdefault("VLLM_LOGGING_LEVEL", log_level)
    return Server(f"http://127.0.0.1:{port}", launch(command, log, env), log)


def wait_until_ready(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}:\n{server.log[-4000:]}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise RuntimeError(f"the server was not ready after {START_SECONDS:g} s:\n{server.log[-4000:]}")


def stop(server: Server) -> None:
    """End the whole process group, politely first; does nothing if it has ended."""
    server.process.send_signal(signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(20)
    finally:  # a second Ctrl-C doesn't leave it behind either
        if group_members(server):
            os.killpg(server.process.pid, signal.SIGKILL)


def remove_log(server: Server) -> None:
    """Remove the folder of its log, unless FRAQTL_KEEP_LOGS is set."""
    if not os.environ.get("FRAQTL_KEEP_LOGS"):
        shutil.rmtree(server.log_file.parent, ignore_errors=True)


def group_members(server: Server) -> list[int]:
    """Processes of the server's group that are still alive."""
    return [pid for pid, fields in _group(server).items() if fields[0] != "Z"]


def cpu_seconds(server: Server) -> float:
    """CPU time that the server's processes have taken so far, in the kernel and outside."""
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in _group(server).values())
    return ticks / os.sysconf("SC_CLK_TCK")


def _group(server: Server) -> dict[int, list[str]]:
    """By process of the server's group: the fields of its /proc/PID/stat from the third, its state, on."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == server.process.pid:
            found[int(stat.parent.name)] = fields
    return found


@contextmanager
def running(
    *arguments: str,
    environment: dict[str, str] | None = None,
    module: tuple[str, ...] = ("fraqtl_serve", "serve"),
    log_level: str | None = "INFO",
    launch: Launch = popen,
) -> Iterator[Server]:
    server = start(*arguments, environment=environment, module=module, log_level=log_level, launch=launch)
    try:
        wait_until_ready(server)
        yield server
    except BaseException:
        stop(server)
        print(f"the server's log is {server.log_file}", file=sys.stderr)
        raise
    stop(server)
    remove_log(server)
