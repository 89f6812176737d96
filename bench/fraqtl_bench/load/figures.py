"""The report's curves as one PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fraqtl_bench.load.schema import ArmReport, Report
from fraqtl_bench.reporting.figures import pyplot
from fraqtl_bench.reporting.figures import save as write_figure

COLORS = ("#7a8594", "#2e9e4f", "#0b6e99", "#c0392b", "#e8b004", "#9b59b6", "#56b4d3", "#a0522d")
PANELS = (
    ("output tokens/s", ("output_tokens_per_s",)),
    ("time to the first token, ms (dashed: p99)", ("ttft_ms", "ttft_p99_ms")),
    ("inter-token latency, ms (dashed: p99)", ("itl_ms", "itl_p99_ms")),
    ("preemptions", ("preemptions",)),
    ("time in the queue, ms", ("queue_ms",)),
)


def save(report: Report, folder: Path) -> list[Path]:
    """Write `load.png`; returns the files."""
    plt = pyplot()
    arms = [(arm, color) for arm, color in zip(report.arms, COLORS * 4, strict=False) if arm.summaries]
    by_rate = not any(point.concurrency and point.kind == "ladder" for point in report.settings.points)
    with_fit = any(arm.fit for arm, _ in arms)
    figure, axes = plt.subplots(2, 4 if with_fit else 3, figsize=(20 if with_fit else 15, 8))
    flat = list(axes.flat)
    for ax, (title, names) in zip(flat, PANELS, strict=False):
        for arm, color in arms:
            for name, style in zip(names, ("o-", "s--"), strict=False):
                _curve(ax, arm, name, by_rate, fmt=style, color=color, label=arm.name if style == "o-" else None)
        ax.set(title=title, xlabel="requests/s asked for" if by_rate else "concurrency", ylim=(0, None))
    _pareto(flat[5], arms)
    if with_fit:
        _fits(flat[6], arms)
        flat[7].axis("off")
    for ax in flat[: 7 if with_fit else 6]:
        ax.grid(alpha=0.3)
    flat[0].legend()
    return [write_figure(plt, figure, folder / "load.png")]


def _curve(ax: Any, arm: ArmReport, name: str, by_rate: bool, **style: Any) -> None:
    """Medians with their extremes as bars."""
    found = sorted(
        (summary.point.rate if by_rate else summary.point.concurrency, summary.values[name])
        for summary in arm.summaries
        if summary.point.kind == "ladder" and name in summary.values and (summary.point.rate is not None) == by_rate
    )
    if found:
        xs, ys = zip(*found, strict=True)
        bars = [[y.median - y.low for y in ys], [y.high - y.median for y in ys]]
        ax.errorbar(xs, [y.median for y in ys], yerr=bars, ms=4, capsize=3, **style)


def _pareto(ax: Any, arms: list[tuple[ArmReport, str]]) -> None:
    for arm, color in arms:
        points = [
            (s.values["user_tokens_per_s"].median, s.values["output_tokens_per_s"].median)
            for s in arm.summaries
            if s.point.kind == "ladder" and "user_tokens_per_s" in s.values
        ]
        if points:
            ax.plot(*zip(*points, strict=True), "o-", ms=4, color=color)
    ax.set(title="Pareto", xlabel="output tokens/s per user", ylabel="output tokens/s in total")


def _fits(ax: Any, arms: list[tuple[ArmReport, str]]) -> None:
    for arm, color in arms:
        if arm.fit:
            xs, ys = zip(*arm.fit.points, strict=True)
            ax.plot(xs, ys, "o", ms=5, color=color)
            ax.plot(xs, [arm.fit.intercept_ms + arm.fit.slope_us_per_1k * x / 1e6 for x in xs], "-", color=color)
    ax.set(title="ITL against context", xlabel="tokens of context", ylabel="ms", ylim=(0, None))
