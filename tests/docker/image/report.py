"""Checks as they are made: a line each on the terminal, all of them in the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx

from tests.docker.image.checks import Setting
from tests.docker.image.docker_cli import Container, DockerError

FAILURES = (AssertionError, DockerError, httpx.HTTPError, OSError, ValueError, LookupError)
Found = dict[str, Any]


class Report:
    def __init__(self) -> None:
        self.checks: list[Found] = []

    @property
    def failed(self) -> int:
        return sum(not check["passed"] for check in self.checks)

    def run(self, name: str, check: Callable[[], Found]) -> bool:
        """Make one check; whether it passed."""
        began = time.monotonic()
        found: Found = {}
        error = None
        try:
            found = check()
        except FAILURES as failure:
            error = f"{type(failure).__name__}: {failure}"
        row = {"check": name, "passed": error is None, "seconds": round(time.monotonic() - began, 1), **found}
        self.checks.append(row if error is None else {**row, "error": error})
        shown = error or ", ".join(f"{key} {value}" for key, value in found.items())
        print(f"{'FAIL' if error else 'ok  '} {name}: {shown}", flush=True)
        return error is None

    def run_in(
        self, setting: Setting, name: str, *options: str, checks: tuple[Callable[[Container], Found], ...]
    ) -> None:
        """Start a container and make checks in it, one after another; it is deleted afterwards."""
        try:
            with setting.container(*options) as container:
                self.run(f"{name}: starts", lambda: {"seconds_to_ready": round(container.start_seconds, 1)})
                for check in checks:
                    self.run(f"{name}: {check.__name__.replace('_', ' ')}", partial(check, container))
        except DockerError as error:
            message = str(error)

            def failed() -> Found:
                raise DockerError(message)

            self.run(f"{name}: starts and goes", failed)
