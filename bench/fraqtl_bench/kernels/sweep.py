"""The loop of `fraqtl-bench kernels` and its tables."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fraqtl_bench.kernels.arms import Arm, Prepared, UnavailableError, errors_of
from fraqtl_bench.kernels.shapes import Inputs, Shape
from fraqtl_bench.kernels.timing import Timer

BF16_BASELINES = ("sdpa-bf16", "fa3-bf16", "flashinfer-bf16")
WRITE_BASELINES = ("bf16",)

Found = dict[str, dict[str, Any]]
Save = Callable[[dict[str, Found]], None]


def _forget(found: dict[str, Found]) -> None:
    """Nothing is to be saved on the way."""


def prepare(arm: Arm, inputs: Inputs) -> Prepared:
    """Raises UnavailableError for whatever goes wrong in an arm that isn't ours, and for too little memory."""
    try:
        return arm.prepare(inputs)
    except torch.OutOfMemoryError as error:
        raise UnavailableError("not enough memory") from error
    except UnavailableError:
        raise
    except Exception as error:
        if not arm.foreign:
            raise
        raise UnavailableError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def measure(
    grid: list[Shape],
    arms: list[Arm],
    timer: Timer,
    ceiling: float,
    repeats: int,
    args: argparse.Namespace,
    save: Save = _forget,
) -> dict[str, Found]:
    """Per shape and arm: times, bytes, errors, or the reason why it was skipped. save: called with all there is after
    every shape, so that a run that is killed leaves the shapes before."""
    found: dict[str, Found] = {}
    with Progress() as progress:
        for shape in progress.track(grid, description="shapes"):
            found[str(shape)] = _measure_shape(shape, arms, timer, ceiling, repeats, args)
            save(found)
    return found


def _measure_shape(
    shape: Shape, arms: list[Arm], timer: Timer, ceiling: float, repeats: int, args: argparse.Namespace
) -> Found:
    device = torch.device(args.device)
    found: Found = {}
    ready: dict[str, list[Any]] = {}
    for number in range(args.max_sets):
        # All arms see the same sets; one that has enough of them for its working set takes no more.
        wanting = [
            a
            for a in arms
            if "skipped" not in found.get(a.name, {})
            and (number == 0 or number * found[a.name]["bytes"] < args.working_set << 20)
        ]
        if not wanting:
            break
        inputs = Inputs.random(shape, args.block_size, args.seed + number, device)
        truth = inputs.truth() if number == 0 else None
        for arm in wanting:
            try:
                prepared = prepare(arm, inputs)
                called = prepared.writing(inputs) if args.write else prepared
                if number == 0:
                    found[arm.name] = {"bytes": called.bytes, **errors_of(prepared, inputs, truth)}
                ready.setdefault(arm.name, []).append(timer.ready(called))
            except UnavailableError as reason:
                found[arm.name] = {"skipped": str(reason)}
                ready.pop(arm.name, None)
            except Exception as error:
                if not arm.foreign:
                    raise
                found[arm.name] = {"skipped": _first_line(error)}
                ready.pop(arm.name, None)
    timed: dict[str, list[Any]] = {name: [] for name in ready}
    for i in range(repeats):
        for name, sets in ready.items():
            timed[name].append(timer.time(sets[i % len(sets)]))
    for name, calls in timed.items():
        found[name] |= summarize(timer.seconds(calls), found[name]["bytes"], ceiling) | {"input_sets": len(ready[name])}
        if args.write:
            found[name]["ns_per_vector"] = found[name]["median_ms"] * 1e6 / shape.vectors
    _compare(found, WRITE_BASELINES if args.write else BF16_BASELINES)
    return found


def summarize(seconds: list[float], size: int, ceiling: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return {
        "median_ms": median * 1e3,
        "fastest_ms": min(seconds) * 1e3,
        "quartiles_ms": [quartiles[0] * 1e3, quartiles[2] * 1e3],
        "gb_per_s": size / median / 1e9,
        "share_of_copy_bandwidth": size / median / ceiling,
    }


def _compare(found: Found, baselines: Sequence[str]) -> None:
    """Speed against the fastest baseline that ran."""
    times = {name: found[name]["median_ms"] for name in baselines if "median_ms" in found.get(name, {})}
    if not times:
        return
    best = min(times, key=lambda name: times[name])
    for entry in found.values():
        if "median_ms" in entry:
            entry |= {"baseline": best, "speed_against_baseline": times[best] / entry["median_ms"]}


def print_times(measured: dict[str, Found], ceiling: float) -> None:
    """One table a shape."""
    console = Console()
    for shape, found in measured.items():
        table = Table(title=f"{shape} (a copy runs at {ceiling / 1e9:.0f} GB/s)")
        writes = any("ns_per_vector" in entry for entry in found.values())
        for column in ("arm", "ms", "speed", "GB/s", "of copy", "ns a vector" if writes else "kernel error"):
            table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
        for name, entry in found.items():
            if "median_ms" in entry:
                table.add_row(name, *_time_cells(entry))
        console.print(table)
        for name, entry in found.items():
            if "skipped" in entry:
                console.print(f"{name} was skipped: {entry['skipped']}", highlight=False)


def _time_cells(entry: dict[str, Any]) -> list[str]:
    speed, error, vector = entry.get("speed_against_baseline"), entry["kernel_error"], entry.get("ns_per_vector")
    return [
        f"{entry['median_ms']:.3f}",
        "-" if speed is None else f"{speed:.2f}x",
        f"{entry['gb_per_s']:.1f}",
        f"{entry['share_of_copy_bandwidth']:.0%}",
        f"{vector:.0f}" if vector is not None else "-" if error is None else f"{error:.1e}",
    ]


def measure_errors(
    grid: list[Shape], arms: list[Arm], args: argparse.Namespace, save: Save = _forget
) -> dict[str, Found]:
    """Per shape and arm: relative errors against float64. save: as for `measure`."""
    found: dict[str, Found] = {}
    for shape in grid:
        inputs = Inputs.random(shape, args.block_size, args.seed, torch.device(args.device))
        truth = inputs.truth()
        entries: Found = {}
        for arm in arms:
            try:
                entries[arm.name] = dict(errors_of(prepare(arm, inputs), inputs, truth))
            except UnavailableError as reason:
                entries[arm.name] = {"skipped": str(reason)}
        found[str(shape)] = entries
        save(found)
    return found


def print_errors(measured: dict[str, Found]) -> None:
    table = Table(title="relative error against float64: kernel / quantisation / total")
    table.add_column("arm")
    for shape in measured:
        table.add_column(shape, justify="right")
    for name in next(iter(measured.values())):
        table.add_row(name, *(_error_cell(found[name]) for found in measured.values()))
    Console().print(table)


def _error_cell(entry: dict[str, Any]) -> str:
    if "skipped" in entry:
        return f"skipped: {entry['skipped'][:40]}"
    values = (entry["kernel_error"], entry["quantisation_error"], entry["total_error"])
    return " / ".join("-" if value is None else f"{value:.1e}" for value in values)
