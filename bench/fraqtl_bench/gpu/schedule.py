"""Steps with a clock each, and one archive of everything so far.

A GPU that is lent by the minute is taken away at its time, whatever runs. So every step has a limit, all of them
together another, and the archive is written anew every few seconds: a run that is killed leaves what it had. A
step that must pass ends the run if it doesn't.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[3]  # of the project: where steps run
ARCHIVE = "results.tar.gz"
PACK_EVERY = 10.0  # seconds
LEAST = 3.0  # seconds that a step needs to start
GRACE = 2.0  # seconds from a request to end to the next, and to the kill


@dataclass(frozen=True)
class Step:
    """A command, seconds it may take, and whether the run ends with it if it fails."""

    name: str
    limit: float
    command: Sequence[str]
    must_pass: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """status: passed, failed, timed out, no time left, or not run. start, seconds: by the clock of the run."""

    name: str
    status: str
    start: float
    seconds: float
    limit: float


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


class Run:
    """Runs steps in a folder, `work`, and keeps the archive in another, `out`."""

    def __init__(self, work: Path, out: Path, limit: float) -> None:
        self.work, self.out, self.end = work, out, time.monotonic() + limit
        self.begin = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.child: subprocess.Popen[bytes] | None = None
        for folder in (work, out):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def go(self, steps: Sequence[Step], report: Callable[[list[Outcome]], str]) -> bool:
        """Run them in their order; whether all passed. report: makes the verdict, which is kept in the archive after
        every step."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for number, step in enumerate(steps):
                outcome = self._step(step)
                self._note(outcome, report=report)
                if step.must_pass and outcome.status != "passed":
                    print(f"\n{step.name} {outcome.status}: the run ends here, give the GPU back", flush=True)
                    rest = (Outcome(s.name, "not run", self.elapsed, 0, s.limit) for s in steps[number + 1 :])
                    self._note(*rest, report=report)
                    break
        finally:
            self._stop()
            self.pack()
        return all(outcome.status == "passed" for outcome in self.outcomes)

    def _note(self, *outcomes: Outcome, report: Callable[[list[Outcome]], str]) -> None:
        self.outcomes += outcomes
        (self.work / "steps.json").write_text(json.dumps([asdict(o) for o in self.outcomes], indent=1) + "\n")
        (self.work / "verdict.md").write_text(report(self.outcomes))
        self.pack()

    def _step(self, step: Step) -> Outcome:
        start = self.elapsed
        limit = min(step.limit, self.end - time.monotonic())
        if limit < LEAST:
            print(f"{start:5.0f} s  {step.name}: no time left", flush=True)
            return Outcome(step.name, "no time left", start, 0, step.limit)
        print(f"{start:5.0f} s  {step.name} (at most {limit:.0f} s)", flush=True)
        log = self.work / f"{step.name}.log"
        with log.open("wb") as output:
            self.child = subprocess.Popen(
                step.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **step.environment},
                cwd=ROOT,
                start_new_session=True,  # so that its children end with it
            )
            code = self._wait(start + limit)
        self._stop()
        status = "timed out" if code is None else "failed" if code else "passed"
        took = self.elapsed - start
        print(f"{self.elapsed:5.0f} s  {step.name} {status} after {took:.1f} s", flush=True)
        if status != "passed":
            print(tail(log), flush=True)
        return Outcome(step.name, status, start, took, step.limit)

    def _wait(self, end: float) -> int | None:
        """Exit status of the child, None if it runs on at `end`."""
        assert self.child is not None
        while True:
            left = end - self.elapsed
            if left <= 0:
                return None
            with suppress(subprocess.TimeoutExpired):
                return self.child.wait(min(left, PACK_EVERY))
            self.pack()

    def _stop(self) -> None:
        """End the child and all that it started, servers in process groups of their own included: what stays behind
        would hold the GPU's memory."""
        child, self.child = self.child, None
        if child is None:
            return
        started = descendants(child.pid)
        for request in (signal.SIGINT, signal.SIGTERM):  # upon the first pytest still writes its report
            if child.poll() is None:
                child.send_signal(request)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for process in started:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def pack(self) -> None:
        """All files of the run in one archive, whole or as it was before."""
        partial = self.out / f"{ARCHIVE}.partial"
        with tarfile.open(partial, "w:gz") as tar:
            for path in sorted(self.work.iterdir()):
                with suppress(OSError):  # a file that a step just moved
                    tar.add(path, path.name)
        partial.replace(self.out / ARCHIVE)


def tail(path: Path, lines: int = 12) -> str:
    return "\n".join("    " + line for line in path.read_text(errors="replace").splitlines()[-lines:])


def descendants(process: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, at = [], [process]
    while at:
        at = [child for parent in at for child in children.get(parent, [])]
        found += at
    return found
