"""Result files as the pages quote them, and the registry of blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fraqtl_kernels.errors import ConfigError

ROOT = Path(__file__).parents[4]
RESULTS = "bench/results"
ROOT_MARK = "@ROOT@/"
"""What a link of a block begins with. On a page it becomes the way from there to the repository."""

MODELS = {
    "demo": "fraqtl-demo",
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B",
    "gemma3-270m": "Gemma-3-270M",
}

Block = Callable[[], Iterable[str]]
BLOCKS: dict[str, Block] = {}


def block(name: str) -> Callable[[Block], Block]:
    """Registers a function that yields the lines of the block `name`."""

    def add(make: Block) -> Block:
        BLOCKS[name] = make
        return make

    return add


@dataclass(frozen=True)
class Result:
    """One file below bench/results."""

    path: str
    data: Any

    @property
    def about(self) -> dict[str, Any]:
        """Command, machine and time, wherever the file has them."""
        found: dict[str, Any] = self.data.get("provenance", self.data) if isinstance(self.data, dict) else {}
        return found

    @property
    def machine(self) -> str:
        machine = self.about.get("machine", self.about)
        if "cpu" not in machine:
            return "not recorded"
        cores = machine["cores"]
        return f"{machine['cpu']}, {cores} {'core' if cores == 1 else 'cores'}"

    @property
    def day(self) -> str:
        return str(self.about.get("time", ""))[:10]

    @property
    def command(self) -> str:
        return str(self.about.get("command", ""))

    @property
    def link(self) -> str:
        return f"[{self.path}]({ROOT_MARK}{RESULTS}/{self.path})"

    @property
    def model(self) -> dict[str, Any]:
        """The first model of a report of the quality lab."""
        found: dict[str, Any] = self.data["models"][0]
        return found

    def method(self, name: str, model: int = 0) -> dict[str, Any]:
        """A row of the quality lab."""
        rows = self.data["models"][model]["rows"]
        return next(row for row in rows if row["method"] == name)


@lru_cache
def load(path: str) -> Result:
    """Raises ConfigError if the file isn't there."""
    file = ROOT / RESULTS / path
    if not file.is_file():
        raise ConfigError(f"{RESULTS}/{path} is missing, and a page quotes it")
    return Result(path, json.loads(file.read_text(encoding="utf-8")))


def source(*files: Result, model: str, command: str = "", machine: str = "") -> Iterator[str]:
    """Where the numbers above come from: model, machine, day, files, and the commands that they record."""
    machines = [machine] if machine else list(dict.fromkeys(file.machine for file in files))
    days = sorted({file.day for file in files if file.day})
    span = days[:1] if len(set(days)) < 2 else [f"{days[0]} to {days[-1]}"]
    facts = [f"Model: {model}", f"machine: {' and '.join(machines)}", *(f"measured {day}" for day in span)]
    yield ""
    yield "; ".join(facts) + "."
    many = "s" if len(files) > 1 else ""
    yield f"Result file{many}: {', '.join(file.link for file in files)}."
    commands = [command] if command else list(dict.fromkeys(file.command for file in files if file.command))
    yield ""
    yield "```"
    yield from commands
    yield "```"
    yield ""
