"""From runs to curves: spreads over repeats, ratios within a repeat, the fit of inter-token latency, the frontier."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from fraqtl_bench.load.arms import arms_of
from fraqtl_bench.load.measure import Outcome
from fraqtl_bench.load.metrics import add_request_size
from fraqtl_bench.load.schema import ArmReport, Fit, Point, Run, Settings, Spread, Summary

VALUES: dict[str, Callable[[Run], float | None]] = {
    "output_tokens_per_s": lambda r: r.output_tokens_per_s,
    "total_tokens_per_s": lambda r: r.total_tokens_per_s,
    "requests_per_s": lambda r: r.requests_per_s,
    "goodput": lambda r: r.goodput,
    "user_tokens_per_s": lambda r: r.output_tokens_per_s / r.point.concurrency if r.point.concurrency else None,
    "ttft_ms": lambda r: r.ttft.median,
    "ttft_p99_ms": lambda r: r.ttft.p99,
    "tpot_ms": lambda r: r.tpot.median,
    "tpot_p99_ms": lambda r: r.tpot.p99,
    "itl_ms": lambda r: r.itl.median,
    "itl_p99_ms": lambda r: r.itl.p99,
    "preemptions": lambda r: r.served.preemptions,
    "queue_ms": lambda r: r.served.queue_ms,
    "running_mean": lambda r: r.served.running_mean,
    "running_peak": lambda r: r.served.running_peak,
    "pool_use_peak": lambda r: r.served.pool_use_peak,
    "prefix_hits": lambda r: r.served.prefix_hits,
    "kv_bytes": lambda r: r.served.kv_bytes,
    "saved_bytes": lambda r: r.served.saved_bytes,
    "other_cores": lambda r: r.other_cores,
}
COUNTS = (
    "other_cores",
    "preemptions",
    "running_mean",
    "running_peak",
    "pool_use_peak",
    "prefix_hits",
    "queue_ms",
)  # often 0: no ratios


def spread(values: Iterable[float]) -> Spread | None:
    """Median and extremes; None of nothing."""
    found = sorted(values)
    return Spread(median=statistics.median(found), low=found[0], high=found[-1]) if found else None


def reports(settings: Settings, outcome: Outcome) -> list[ArmReport]:
    """One per arm, in order; the first is what the others are compared with."""
    found = [
        ArmReport(name=arm.name, command=arm.command, reason=outcome.reasons.get(arm.name)) for arm in arms_of(settings)
    ]
    first = found[0]
    for report in found:
        own = [run for run in outcome.runs if run.arm == report.name]
        reference = [run for run in outcome.runs if run.arm == first.name]
        report.summaries = [_summary(point, own, reference) for point in settings.points if _at(point, own)]
        report.fit = fit(own)
        report.capacity = outcome.capacities.get(report.name)
        if report.capacity and own:
            add_request_size(report.capacity, max(request_tokens(run) for run in own if run.point.kind == _main(own)))
        if report.capacity and first.capacity:
            report.capacity_ratio = report.capacity.tokens / first.capacity.tokens
        if report.fit and first.fit and report is not first:
            compare_fits(report.fit, first.fit)
    mark_frontier(found)
    return found


def _main(runs: list[Run]) -> str:
    return "ladder" if any(run.point.kind == "ladder" for run in runs) else "context"


def request_tokens(run: Run) -> float:
    """Prompt and answer of a request, by the server's count, on average."""
    served = run.served
    return (served.prompt_tokens + served.output_tokens) / max(1, served.requests)


def _at(point: Point, runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.point == point]


def _summary(point: Point, runs: list[Run], reference: list[Run]) -> Summary:
    own = _at(point, runs)
    base = {run.repeat: run for run in _at(point, reference)}
    values, ratios = {}, {}
    for name, of in VALUES.items():
        if found := spread(value for run in own if (value := of(run)) is not None):
            values[name] = found
        pairs = [(of(run), of(base[run.repeat])) for run in own if run.repeat in base and name not in COUNTS]
        if found := spread(a / b for a, b in pairs if a is not None and b):
            ratios[name] = found
    return Summary(point=point, repeats=len(own), values=values, ratios=ratios, prompt_share=_prompt_share(own, runs))


def _prompt_share(own: list[Run], runs: list[Run]) -> float | None:
    """Share of the runs' time that their prompts take one after another at the speed of a request that is alone."""
    point = own[0].point
    alone = [
        r.ttft.median
        for r in runs
        if r.point.concurrency == 1 and r.point.rate is None and r.point.input == point.input
    ]
    if not alone:
        return None
    return statistics.median(statistics.median(alone) / 1e3 * run.completed / run.seconds for run in own)


def fit(runs: list[Run]) -> Fit | None:
    """Least squares over the median ITL of each context; None with fewer than two contexts."""
    at: dict[float, list[float]] = {}
    for run in runs:
        if run.point.kind == "context":
            at.setdefault(run.point.input + run.point.output / 2, []).append(run.itl.median)
    if len(at) < 2:
        return None
    points = [(context, statistics.median(values)) for context, values in sorted(at.items())]
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    return Fit(
        concurrency=next(run.point.concurrency or 1 for run in runs if run.point.kind == "context"),
        points=points,
        slope_us_per_1k=slope * 1e6,
        intercept_ms=intercept,
        r_squared=statistics.correlation(xs, ys) ** 2 if len(set(ys)) > 1 else 1.0,
    )


def compare_fits(own: Fit, first: Fit) -> None:
    """Where the two lines cross."""
    slopes, intercepts = own.slope_us_per_1k - first.slope_us_per_1k, own.intercept_ms - first.intercept_ms
    own.slope_ratio = own.slope_us_per_1k / first.slope_us_per_1k if first.slope_us_per_1k else None
    crossing = -intercepts / (slopes / 1e6) if slopes else 0.0
    if crossing <= 0:
        faster = slopes < 0 or (slopes == 0 and intercepts < 0)
        own.verdict = "faster at every context" if faster else "slower at every context"
        return
    own.break_even = crossing
    own.verdict = f"{'faster' if slopes < 0 else 'slower'} from {crossing:,.0f} tokens of context"


def mark_frontier(found: list[ArmReport]) -> None:
    """Summaries that no other one beats in tokens/s per user and in total tokens/s."""
    rivals = [
        s for report in found for s in report.summaries if s.point.kind == "ladder" and "user_tokens_per_s" in s.values
    ]

    def two(summary: Summary) -> tuple[float, float]:
        return summary.values["user_tokens_per_s"].median, summary.values["output_tokens_per_s"].median

    for one in rivals:
        (user, total), others = two(one), [two(other) for other in rivals if other is not one]
        one.on_frontier = not any(u >= user and t >= total and (u, t) != (user, total) for u, t in others)
