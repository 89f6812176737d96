"""What a run has shown, goal by goal, for a reader who hasn't seen it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fraqtl_bench.gpu.lines import usable
from fraqtl_bench.gpu.schedule import Outcome

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Finding:
    """A goal and what was found. verdict: met, met (stretch), missed, or not measured."""

    goal: str
    found: str
    verdict: str


@dataclass(frozen=True)
class SpeedGoal:
    """Speed of packed decode attention against the fastest 16-bit kernel: what must be, what would be good."""

    shape: str
    must: float
    stretch: float


def check(goal: str, value: float | None, must: float, stretch: float | None = None, unit: str = "") -> Finding:
    """At least `must`. value: None if nobody measured it."""
    wanted = f"{goal}: at least {must:g}{unit}" + (f", better {stretch:g}{unit}" if stretch else "")
    if value is None:
        return Finding(wanted, "-", NOT_MEASURED)
    verdict = "missed" if value < must else "met (stretch)" if stretch and value >= stretch else "met"
    return Finding(wanted, f"{value:.3g}{unit}", verdict)


def passed(goal: str, outcomes: Sequence[Outcome], step: str) -> Finding:
    """Whether a step passed."""
    status = next((o.status for o in outcomes if o.name == step), "not run")
    verdict = {"passed": "met", "failed": "missed"}.get(status, NOT_MEASURED)
    return Finding(goal, status, verdict)


def speeds(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By shape of `fraqtl-bench tune`: the fastest baseline, the fastest right variant, their times' ratio."""
    found: dict[str, dict[str, Any]] = {}
    lines = list(lines)
    for kind, chosen in (
        ("baseline", [line for line in lines if line["kind"] == "baseline" and "median_ms" in line]),
        ("variant", usable(lines)),
    ):
        for line in chosen:
            entry = found.setdefault(line["shape"], {})
            if kind not in entry or line["median_ms"] < entry[kind]["median_ms"]:
                entry[kind] = line
    for entry in found.values():
        if {"baseline", "variant"} <= entry.keys():
            entry["speed"] = entry["baseline"]["median_ms"] / entry["variant"]["median_ms"]
    return found


def load(path: Path) -> Any:
    """A JSON file; None if it isn't there or was cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def as_text(title: str, rehearsal: bool, findings: Sequence[Finding], outcomes: Sequence[Outcome]) -> str:
    """Markdown: a sentence, the goals, the steps."""
    met = sum(f.verdict.startswith("met") for f in findings)
    missed = sum(f.verdict == "missed" for f in findings)
    lines = [f"# {title}", ""]
    if rehearsal:
        lines += ["**A rehearsal without a GPU: no number here says anything about one.**", ""]
    lines += [
        f"{met} of {len(findings)} goals met, {missed} missed, {len(findings) - met - missed} not measured.",
        "",
        "| goal | found | verdict |",
        "|---|---|---|",
        *(f"| {f.goal} | {f.found} | {f.verdict} |" for f in findings),
        "",
        "| step | result | from second | took, s | limit, s |",
        "|---|---|---|---|---|",
        *(f"| {o.name} | {o.status} | {o.start:.0f} | {o.seconds:.1f} | {o.limit:g} |" for o in outcomes),
    ]
    return "\n".join(lines) + "\n"
