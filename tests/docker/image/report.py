"""Checks as they are made: a line each on the terminal, all of them in the result.

A group of checks that all passed on the very same image is taken from an earlier result, so that a run that was
stopped, or that failed somewhere, goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import httpx

from tests.docker.image.checks import Setting
from tests.docker.image.docker_cli import Container, DockerError

FAILURES = (AssertionError, DockerError, httpx.HTTPError, OSError, ValueError, LookupError)
Found = dict[str, Any]


def fail(error: Exception) -> Found:
    raise error


class Report:
    """earlier: the checks of an earlier result; save: is called after every group with all checks so far."""

    def __init__(self, earlier: Sequence[Found] = (), save: Callable[[list[Found]], None] = lambda _: None) -> None:
        self.checks: list[Found] = []
        self.earlier = earlier
        self.save = save

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

    def group(self, name: str, image: str, make: Callable[[], object]) -> bool:
        """Make the checks whose names start with `name`, on the image with the id `image`; whether all passed."""
        kept = [row for row in self.earlier if row["check"].startswith(f"{name}: ") and row["image"] == image]
        first = len(self.checks)
        if kept and all(row["passed"] for row in kept):
            self.checks += kept
            print(f"kept {name}: {len(kept)} checks of an earlier run on this image", flush=True)
        else:
            make()
            time_now = datetime.now(UTC).isoformat(timespec="seconds")
            for row in self.checks[first:]:
                row |= {"image": image, "time": time_now}
        self.save(self.checks)
        return all(row["passed"] for row in self.checks[first:])

    def run_in(
        self, setting: Setting, name: str, *options: str, checks: tuple[Callable[[Container], Found], ...]
    ) -> None:
        """Start a container and make checks in it, one after another; it is deleted afterwards."""
        self.group(name, setting.docker.image_id(setting.image), lambda: self._run_in(setting, name, options, checks))

    def _run_in(
        self, setting: Setting, name: str, options: Sequence[str], checks: Sequence[Callable[[Container], Found]]
    ) -> None:
        try:
            with setting.container(*options) as container:
                self.run(f"{name}: starts", lambda: {"seconds_to_ready": round(container.start_seconds, 1)})
                for check in checks:
                    self.run(f"{name}: {check.__name__.replace('_', ' ')}", partial(check, container))
        except DockerError as error:
            self.run(f"{name}: starts and goes", partial(fail, error))
