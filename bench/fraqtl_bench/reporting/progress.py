"""What has been measured so far, one line of JSON a unit, so that `--resume` goes on where a run ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fraqtl_kernels.errors import ConfigError


class Progress:
    """A dictionary that is written as it grows. The first line holds the settings that all the rest depends on."""

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        """Raises ConfigError if there are results that `resume` doesn't ask for, or that other settings made."""
        self.path = path
        self.done: dict[str, Any] = {}
        if path.exists() and not resume:
            raise ConfigError(
                f"{path} holds an unfinished run: go on with --resume, or delete it, or give another --out"
            )
        if path.exists():
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def _read(self, settings: dict[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8").split("\n")
        before = json.loads(lines[0])
        other = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
        if other:
            raise ConfigError(f"{self.path} was made with another {', '.join(other)}: resume with the same settings")
        whole = [line for line in lines[1:-1] if line]  # what stands behind the last line end was cut off
        self.done = dict(json.loads(line) for line in whole)
        self.path.write_text("\n".join([lines[0], *whole]) + "\n", encoding="utf-8")

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The result called `key`; measured, and written, if it isn't there yet."""
        if key not in self.done:
            value = measure()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")
            self.done[key] = value
        return self.done[key]

    def finish(self) -> None:
        """The run is complete: its report holds all that was noted here."""
        self.path.unlink(missing_ok=True)
