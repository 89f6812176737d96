"""Runs a command in a terminal of its own, as a user would: keys go in, text comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    def __init__(self, process: subprocess.Popen[bytes], side: int) -> None:
        self.process = process
        self.text = ""
        self._side = side

    def press(self, keys: str) -> None:
        os.write(self._side, keys.encode())

    def wait_for(self, text: str, *, times: int = 1, seconds: float = 60) -> None:
        """Until `text` has been shown so many times."""
        end = time.monotonic() + seconds
        while self.text.count(text) < times:
            assert time.monotonic() < end, f"no {text!r} in {self.text!r}"
            self._read()

    def wait_for_end(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.text!r}"
            self._read()
        self._read()
        return self.process.returncode

    def _read(self) -> None:
        if select.select([self._side], [], [], 0.1)[0]:
            try:
                self.text += os.read(self._side, 65536).decode(errors="replace")
            except OSError:  # the other side is closed: the command has ended
                time.sleep(0.05)


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    side, other = pty.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(other, termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal

    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    process = subprocess.Popen(
        command,
        stdin=other,
        stdout=other,
        stderr=other,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(other)
    try:
        yield Terminal(process, side)
    finally:
        process.kill()
        process.wait()
        os.close(side)


def fraqtl_serve(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "fraqtl_serve", *arguments)
