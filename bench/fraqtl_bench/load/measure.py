"""The turns of a run: which server is loaded when, what is noted, and what happens to an arm that fails."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from fraqtl_bench.load import metrics
from fraqtl_bench.load.arms import Arm, ArmError, Target, arms_of
from fraqtl_bench.load.drive import drive, warm_up
from fraqtl_bench.load.schema import Capacity, Point, Run, Settings
from fraqtl_bench.reporting.progress import Progress


@dataclass(frozen=True)
class Turn:
    """One arm's server, and what it is asked for before it is another's turn."""

    repeat: int
    arm: Arm
    points: list[Point]


@dataclass
class Outcome:
    """What has been measured so far. reasons: why an arm did not run, or not to its end.
    warm: arms that were warmed up."""

    runs: list[Run] = field(default_factory=list)
    capacities: dict[str, Capacity] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    warm: set[str] = field(default_factory=set)


class Ticker:
    """Told what happens; the command shows bars."""

    def expect(self, runs: int) -> None:
        """So many runs in all, those of an earlier run included."""

    def says(self, what: str) -> None:
        """What is being done now."""

    def tick(self) -> None:
        """One run is done."""


def turns(settings: Settings) -> Iterator[Turn]:
    """A B A B: whole ladders where a server has to be started for it, single points where all of them run."""
    arms = arms_of(settings)
    for repeat in range(settings.repeats):
        if settings.urls:
            yield from (Turn(repeat, arm, [point]) for point in settings.points for arm in arms)
        else:
            yield from (Turn(repeat, arm, settings.points) for arm in arms)


def key(turn: Turn, point: Point) -> str:
    return f"{turn.repeat}/{turn.arm.name}/{point.name}"


def seed_of(settings: Settings, repeat: int, point: Point) -> int:
    """The same prompts for every arm, others for every point and repeat: no run finds those of another cached."""
    return zlib.crc32(f"{settings.seed}/{repeat}/{point.name}".encode()) & 0x7FFFFFFF


def measure(settings: Settings, notes: Progress, ticker: Ticker, outcome: Outcome) -> None:
    """Fill `outcome`, turn by turn. What an interrupt leaves undone is not in it; what failed is, with its reason."""
    ticker.expect(settings.repeats * len(settings.arms) * len(settings.points))
    for turn in turns(settings):
        name = turn.arm.name
        todo = []
        for point in turn.points:
            if key(turn, point) in notes.done:
                outcome.runs.append(Run(**notes.done[key(turn, point)]))
                ticker.tick()
            else:
                todo.append(point)
        if f"capacity/{name}" in notes.done:
            outcome.capacities[name] = Capacity(**notes.done[f"capacity/{name}"])
        if todo and name not in outcome.reasons:
            try:
                _take(turn, todo, settings, notes, ticker, outcome)
            except ArmError as error:
                outcome.reasons[name] = str(error)
                ticker.says(f"{name}: {error}")


def _take(turn: Turn, todo: list[Point], settings: Settings, notes: Progress, ticker: Ticker, outcome: Outcome) -> None:
    name, where = turn.arm.name, f"{turn.arm.name}, repeat {turn.repeat + 1}"
    ticker.says(f"{where}: waiting for its server")
    with turn.arm.serving() as target, metrics.client() as http:
        try:
            _note_capacity(target, http, notes, outcome)
            if not settings.urls or name not in outcome.warm:
                ticker.says(f"{where}: warming up")
                warm_up(http, target, settings, seed_of(settings, turn.repeat, todo[0]))
                outcome.warm.add(name)
            for point in todo:
                ticker.says(f"{where}: {point.name}")
                seed = seed_of(settings, turn.repeat, point)
                load = partial(_drive, http, target, settings, point, turn.repeat, seed)
                outcome.runs.append(Run(**notes.get(key(turn, point), load)))
                ticker.tick()
        except httpx.HTTPError as error:
            target.check_alive(http)
            raise ArmError(f"its server at {target.url} failed: {type(error).__name__}") from error


def _drive(*arguments: Any) -> dict[str, Any]:
    return drive(*arguments).model_dump()


def _note_capacity(target: Target, http: httpx.Client, notes: Progress, outcome: Outcome) -> None:
    found = metrics.capacity(http, target.url)
    if found is not None:
        notes.get(f"capacity/{target.arm}", found.model_dump)
        outcome.capacities[target.arm] = found
