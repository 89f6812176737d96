"""The run of `fraqtl-bench load`: measure, and write the report whatever happens."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from fraqtl_bench import results
from fraqtl_bench.load import figures, summary
from fraqtl_bench.load.arms import check_names
from fraqtl_bench.load.markdown import markdown
from fraqtl_bench.load.measure import Outcome, Ticker, measure
from fraqtl_bench.load.options import settings_of
from fraqtl_bench.load.schema import Report, Settings
from fraqtl_bench.reporting.figures import pyplot
from fraqtl_bench.reporting.files import write_whole
from fraqtl_bench.reporting.page import fill
from fraqtl_bench.reporting.progress import Progress

NOTES = "progress.jsonl"
COMPLETE = "complete"
ARM_FAILED = 3  # exit status


class BarTicker(Ticker):
    """One bar over all runs; what is being done stands behind it. Failures stay on the screen."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.task = bars.add_task("runs", total=None, what="")

    def expect(self, runs: int) -> None:
        self.bars.update(self.task, total=runs)

    def says(self, what: str) -> None:
        self.bars.update(self.task, what=what)
        if not self.bars.console.is_terminal:
            self.bars.console.print(what, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        self.bars.advance(self.task)


def run(args: argparse.Namespace) -> None:
    """Exits with 3 if an arm did not run to its end, with 130 or 143 if it was interrupted; but writes the report."""
    settings = settings_of(args)
    if not settings.urls:
        check_names(settings.arms)
    if not args.no_figures:
        pyplot()
    notes = Progress(args.out / NOTES, settings.model_dump(), args.resume)
    outcome, start, ended, status = Outcome(), time.monotonic(), COMPLETE, 0
    try:
        _measure(settings, notes, outcome)
    except (KeyboardInterrupt, SystemExit) as stopped:
        ended, status = "interrupted", getattr(stopped, "code", 128 + signal.SIGINT)
    if outcome.reasons and ended == COMPLETE:
        ended = "; ".join(f"{name}: {reason}" for name, reason in outcome.reasons.items())
        status = ARM_FAILED
    finish(make_report(settings, outcome, ended, time.monotonic() - start), args, notes)
    sys.exit(status)


def finish(report: Report, args: argparse.Namespace, notes: Progress) -> None:
    """Write what there is, and keep the notes if there is more to do."""
    if report.runs or any(arm.reason for arm in report.arms):
        write(report, args.out, with_figures=not args.no_figures and bool(report.runs))
    if report.ended == COMPLETE or not notes.done:
        notes.finish()
    else:
        print(f"fraqtl-bench: the report is partial ({report.ended}); --resume goes on", file=sys.stderr)


def _measure(settings: Settings, notes: Progress, outcome: Outcome) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, *times, TextColumn("{task.fields[what]}")) as bars:
        measure(settings, notes, BarTicker(bars), outcome)


def make_report(settings: Settings, outcome: Outcome, ended: str, seconds: float) -> Report:
    return Report(
        provenance=results.provenance(),
        settings=settings,
        ended=ended,
        seconds=seconds,
        arms=summary.reports(settings, outcome),
        runs=outcome.runs,
    )


def write(report: Report, folder: Path, *, with_figures: bool) -> None:
    """JSON, Markdown, page and figure, and a table on the screen."""
    write_whole(folder / "load.json", report.model_dump_json(indent=1) + "\n")
    write_whole(folder / "load.md", markdown(report))
    write_whole(folder / "load.html", fill("fraqtl_bench.load", report.model_dump(mode="json")))
    files = figures.save(report, folder) if with_figures else []
    console = Console()
    console.print(_table(report))
    for arm in report.arms:
        if arm.reason:
            console.print(f"{arm.name}: {arm.reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {folder}: load.json, load.md, load.html", *(f.name for f in files))


def _table(report: Report) -> Table:
    table = Table(title=f"output tokens/s, and against {report.arms[0].name}")
    table.add_column("load")
    for arm in report.arms:
        table.add_column(arm.name, justify="right")
    for point in report.settings.points:
        cells = []
        for arm in report.arms:
            found = next((s for s in arm.summaries if s.point == point), None)
            ratio = found and found.ratios.get("output_tokens_per_s")
            speed = found and found.values["output_tokens_per_s"].median
            cells.append("" if speed is None else f"{speed:,.1f}" + (f" ({ratio.median:.2f}x)" if ratio else ""))
        table.add_row(point.name, *cells)
    return table
