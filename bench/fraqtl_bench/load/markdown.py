"""The report as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator

from fraqtl_bench.load.schema import ArmReport, Report, Settings, Spread, Summary
from fraqtl_bench.reporting.markdown import number, share, table

MIB = 1 << 20


def dataset(s: Settings) -> str:
    if s.dataset == "custom":
        return f"prompts of `{s.dataset_path}`"
    lengths = sorted({point.input for point in s.points if point.kind == "ladder"})
    sizes = f"{', '.join(f'{length:,}' for length in lengths)} tokens" if lengths else "growing length"
    shared = f", {s.prefixes} prefixes of {s.prefix_len}" if s.dataset == "prefix_repetition" else ", all unique"
    return f"random prompts of {sizes}{shared}"


def spread(values: dict[str, Spread], name: str, digits: int = 1) -> str:
    """Median, and the extremes where they differ from it."""
    if name not in values:
        return ""
    found = values[name]
    middle, low, high = (number(x, digits) for x in (found.median, found.low, found.high))
    return middle if low == high else f"{middle} ({low}-{high})"


def capacity_lines(report: Report) -> Iterator[str]:
    yield "## Capacity"
    yield ""
    head = [
        "arm",
        "pool, MiB",
        "blocks",
        "tokens",
        f"vs {report.arms[0].name}",
        "requests of this load",
        "at full length",
    ]
    rows = []
    for arm in report.arms:
        if not arm.capacity:
            continue
        c = arm.capacity
        pool = number(c.pool_bytes / MIB) if c.pool_bytes else ""
        held = (
            f"{c.requests:,} of {c.request_tokens:,.0f} tokens" if c.requests is not None and c.request_tokens else ""
        )
        rows.append(
            [
                f"`{arm.name}`",
                pool,
                f"{c.blocks:,}",
                f"{c.tokens:,}",
                number(arm.capacity_ratio),
                held,
                number(c.full_length),
            ]
        )
    yield from table(head, rows)


SPEED = ["load", "arm", "output tokens/s", "ratio", "requests/s", "preemptions", "running, mean", "running, peak"]
DELAY = ["load", "arm", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p50", "ITL p99", "queue"]


def at_points(report: Report, kind: str) -> Iterator[tuple[ArmReport, Summary]]:
    for point in report.settings.points:
        for arm in report.arms:
            yield from ((arm, s) for s in arm.summaries if s.point == point and point.kind == kind)


def speed_cells(arm: ArmReport, s: Summary) -> list[str]:
    counts = (spread(s.values, "preemptions", 0), spread(s.values, "running_mean"), spread(s.values, "running_peak", 0))
    speed, ratio = spread(s.values, "output_tokens_per_s"), spread(s.ratios, "output_tokens_per_s", 2)
    return [s.point.name, f"`{arm.name}`", speed, ratio, spread(s.values, "requests_per_s", 2), *counts]


def delay_cells(arm: ArmReport, s: Summary) -> list[str]:
    names = ("ttft_ms", "ttft_p99_ms", "tpot_ms", "tpot_p99_ms", "itl_ms", "itl_p99_ms", "queue_ms")
    return [s.point.name, f"`{arm.name}`", *(spread(s.values, name) for name in names)]


USE = [
    "load", "arm", "goodput, requests/s", "tokens/s per user", "Pareto", "prompts' share", "pool, peak",
    "from prefix cache", "KiB a request", "KiB saved", "cores of others",
]  # fmt: skip


def use_cells(arm: ArmReport, s: Summary) -> list[str]:
    kib = (number(s.values[name].median / 1024, 0) if name in s.values else "" for name in ("kv_bytes", "saved_bytes"))
    shares = (share(s.values[name].median) if name in s.values else "" for name in ("pool_use_peak", "prefix_hits"))
    return [
        s.point.name, f"`{arm.name}`", spread(s.values, "goodput", 2), spread(s.values, "user_tokens_per_s"),
        "yes" if s.on_frontier else "", share(s.prompt_share), *shares, *kib,
        spread(s.values, "other_cores", 2),
    ]  # fmt: skip


def fit_lines(report: Report) -> Iterator[str]:
    fits = [(arm, arm.fit) for arm in report.arms if arm.fit]
    if not fits:
        return
    yield "## Inter-token latency against context"
    yield ""
    yield (
        f"ITL = slope x context + intercept, least squares over the medians at {len(fits[0][1].points)} contexts, "
        f"{fits[0][1].concurrency} at a time; context is the prompt and half of the answer."
    )
    yield ""
    head = ["arm", "slope, µs per 1,000 tokens", f"vs {report.arms[0].name}", "intercept, ms", "R²", "", "ms at tokens"]
    rows = [
        [
            f"`{arm.name}`", number(fit.slope_us_per_1k, 1), number(fit.slope_ratio), number(fit.intercept_ms, 3),
            number(fit.r_squared, 3), fit.verdict, ", ".join(f"{y:.3f} at {x:,.0f}" for x, y in fit.points),
        ]
        for arm, fit in fits
    ]  # fmt: skip
    yield from table(head, rows)


def lines(report: Report) -> Iterator[str]:
    s = report.settings
    yield "# Load"
    yield ""
    memory = (
        f"{s.kv_memory_bytes / MIB:g} MiB of KV memory" if s.kv_memory_bytes else "KV memory as the servers took it"
    )
    answers = sorted({point.output for point in s.points})
    what = "Running servers" if s.urls else s.model or "The demo model"
    yield (
        f"{what}, {memory}, {dataset(s)}, answers of {', '.join(map(str, answers))} tokens; {s.repeats} turns of "
        f"every arm, interleaved. Numbers are medians of the turns with their extremes; ratios are to "
        f"`{report.arms[0].name}` in the same turn; times in ms."
    )
    yield ""
    made = report.provenance
    yield f"Made by `{made['command']}` in {report.seconds:.0f} s on {made['machine']['cpu']}."
    yield ""
    if report.ended != "complete":
        yield f"**Partial: {report.ended}.**"
        yield ""
    for arm in report.arms:
        if arm.reason:
            yield f"- `{arm.name}` did not run{' to its end' if arm.summaries else ''}: {arm.reason}"
            yield ""
    yield from capacity_lines(report)
    found = list(at_points(report, "ladder"))
    if found:
        for title, head, cells in (
            ("Throughput", SPEED, speed_cells), ("Latency", DELAY, delay_cells), ("Use", USE, use_cells),
        ):  # fmt: skip
            yield f"## {title}"
            yield ""
            yield from table(head, [cells(arm, summary) for arm, summary in found])
    yield from fit_lines(report)


def markdown(report: Report) -> str:
    return "\n".join(lines(report))
