"""The run of `fraqtl-bench quality`: every model, then the report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import httpx
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from fraqtl_bench import results
from fraqtl_bench.quality import budget, figures, page, through_server
from fraqtl_bench.quality.lab import Lab, Ticker, out_of_memory
from fraqtl_bench.quality.markdown import markdown
from fraqtl_bench.quality.methods import parse, quick_names
from fraqtl_bench.quality.models import Subject, load
from fraqtl_bench.quality.options import SEARCH_TOKENS, settings_of
from fraqtl_bench.quality.schema import ModelReport, Report, Settings
from fraqtl_bench.reporting.figures import pyplot
from fraqtl_bench.reporting.files import write_whole
from fraqtl_bench.reporting.progress import Progress
from fraqtl_kernels.errors import ConfigError, UnsupportedError

NOTES = "progress.jsonl"


class BarTicker(Ticker):
    """A bar per model and measure that counts units; the method stands behind it."""

    def __init__(self, bars: Bars, model: str) -> None:
        self.bars = bars
        self.model = model
        self.tasks: dict[str, TaskID] = {}

    def expect(self, measure: str, units: int | None) -> None:
        self.tasks[measure] = self.bars.add_task(f"{self.model}: {measure}", total=units, what="")

    def tick(self, measure: str, what: str) -> None:
        if measure not in self.tasks:
            self.expect(measure, None)
        self.bars.update(self.tasks[measure], advance=1, what=what)


def run(args: argparse.Namespace) -> None:
    """Everything that the arguments ask for; writes the report only when all of it is there."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.no_figures:
        pyplot()
    found, published = settings_of(args, "cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(**found)
    for name in settings.methods or ():
        parse(name, settings.seed)
    start = time.monotonic()
    kept = args.notes is not None
    args.out.mkdir(parents=True, exist_ok=True)
    notes = Progress(
        args.notes or args.out / NOTES, {**settings.model_dump(), "quick": args.quick}, args.resume or kept
    )
    try:
        models = _measure_all(args, settings, notes)
    except Exception as error:
        if not notes.done:
            notes.finish()
        if out_of_memory(error):
            raise ConfigError(
                f"memory ran out: go on with --resume on a larger machine, or start again with a --window below "
                f"{settings.window} or another --dtype"
            ) from error
        raise
    seconds = time.monotonic() - start
    report = Report(
        provenance=results.provenance(), settings=settings, seconds=seconds, published=published, models=models
    )
    write(report, args.out, with_figures=not args.no_figures)
    if not kept:
        notes.finish()


def _measure_all(args: argparse.Namespace, settings: Settings, notes: Progress) -> list[ModelReport]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    reports = []
    with Bars(*columns, TimeElapsedColumn(), TextColumn("{task.fields[what]}")) as bars:
        for name in settings.models:
            subject = load(name, settings.dtype, settings.device)
            reports.append(_measure(args, subject, settings, notes, BarTicker(bars, subject.name)))
            del subject
    return reports


def _measure(
    args: argparse.Namespace, subject: Subject, settings: Settings, notes: Progress, ticker: BarTicker
) -> ModelReport:
    if args.budget is not None:
        budget.check_budget(args.budget, subject.head_size)
    with httpx.Client() as client:
        for url in args.through_server or ():
            through_server.Endpoint(url, client)  # an hour later is late to find that nobody answers
    if args.quick and settings.methods is None:
        settings = settings.model_copy(update={"methods": quick_names(subject.head_size)})
    lab = Lab(subject, settings, notes, ticker)
    report = lab.run()
    if args.budget is not None:
        report.allocation = budget.search(lab, args.budget, SEARCH_TOKENS if not args.quick else settings.tokens)
        path = args.out / (
            "fraqtl-profile.json" if len(settings.models) == 1 else f"{subject.name}-fraqtl-profile.json"
        )
        budget.write_profile(path, budget.profile(subject.name, subject.head_size, report.allocation))
    with httpx.Client() as client:
        report.through_server = [
            through_server.measure(lab, url, client, args.server_calibration, residual=args.server_residual)
            for url in args.through_server or ()
        ]
    return report


def write(report: Report, folder: Path, *, with_figures: bool) -> None:
    """JSON, Markdown, page and figures."""
    if not report.models:
        raise UnsupportedError("no model was measured: name one")
    text = markdown(report)
    write_whole(folder / "quality.json", report.model_dump_json(indent=1) + "\n")
    write_whole(folder / "quality.md", text)
    write_whole(folder / "quality.html", page.page(report))
    files = figures.save(report, folder) if with_figures else []
    Console().print(f"written to {folder}: quality.json, quality.md, quality.html", *(f.name for f in files))
