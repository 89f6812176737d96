"""The report as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator

from fraqtl_bench.quality.methods import BASELINE
from fraqtl_bench.quality.ruler.tables import ruler_lines, through_lines
from fraqtl_bench.quality.schema import Allocation, Law, ModelReport, Report, Row, Through
from fraqtl_bench.quality.verdict import MAIN_BUDGET, Duel, best_at, duels, spreads
from fraqtl_bench.reporting.markdown import number, share, table

HEAD = [
    "method", "family", "budget", "basis", "side", "dims", "bits/dim", "PPL", "vs fp16", "margin",
    "last word", "needle", "flips", "attention KL",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    return [
        f"`{row.method}`", row.family, f"{row.budget:g}", row.basis, row.side, str(row.dims),
        number(row.bits_per_dim, 3), number(row.perplexity, 3), delta(row), number(row.margin),
        share(row.last_word_accuracy), share(row.needle_accuracy), share(row.flips),
        number(row.attention_divergence, 4),
    ]  # fmt: skip


def delta(row: Row) -> str:
    error = row.perplexity_delta_error
    return number(row.perplexity_delta, 3) + (f" ± {error:.3f}" if error else "")


def model_lines(model: ModelReport) -> Iterator[str]:
    yield f"## {model.model}"
    yield ""
    yield (
        f"{model.attention} {model.group}:1, {model.layers} layers, {model.heads} query and {model.kv_heads} KV heads "
        f"of size {model.head_size}, {model.parameters:,} parameters, {model.dtype}; "
        f"{model.scored_tokens:,} scored tokens in "
        f"{model.windows} windows."
    )
    yield ""
    yield from table(HEAD, [cells(row) for row in model.rows])
    yield from divergence_lines(model)
    if model.skipped:
        yield "Left out: " + "; ".join(f"`{name}` ({why})" for name, why in model.skipped.items()) + "."
        yield ""
    yield from verdict_lines(model)
    yield from ruler_lines(model)
    if model.law:
        yield from law_lines(model.law)
    if model.allocation:
        yield from allocation_lines(model.allocation)
    if model.through_server:
        yield from server_lines(model.through_server)
        yield from through_lines(model)


def divergence_lines(model: ModelReport) -> Iterator[str]:
    """The next token's distribution against that with a 16-bit cache: over all tokens, and by context length."""
    rows = [(row, row.divergence) for row in model.rows if row.divergence is not None]
    if not rows:
        return
    yield "### The next token's distribution, against a 16-bit cache"
    yield ""
    head = ["method", "bits/dim", "KL", "KL 99 %", "KL 99.9 %", "1 - TV", "same first token"]
    every = [
        [
            f"`{row.method}`", number(row.bits_per_dim, 3), with_error(d.kl, d.kl_error), number(d.kl_p99, 4),
            number(d.kl_p999, 4), percent(1 - d.total_variation, d.total_variation_error),
            percent(d.agreement, d.agreement_error),
        ]
        for row, d in rows
    ]  # fmt: skip
    yield from table(head, every)
    classes = [c.up_to for c in rows[0][1].by_context]
    if len(classes) > 1:
        yield "KL by the length of the context:"
        yield ""
        cells_of = ([with_error(c.kl, c.kl_error) for c in d.by_context] for _, d in rows)
        lines = [[f"`{row.method}`", *cells] for (row, _), cells in zip(rows, cells_of, strict=True)]
        yield from table(["method", *(f"to {up_to:,}" for up_to in classes)], lines)


def with_error(x: float, error: float | None) -> str:
    return number(x, 4) if error is None else f"{x:.4f} ± {error:.4f}"


def percent(x: float, error: float | None) -> str:
    return f"{x:.2%}" if error is None else f"{x * 100:.2f} ± {error * 100:.2f} %"


def verdict_lines(model: ModelReport) -> Iterator[str]:
    """The best of either paradigm at every budget, and what the basis changes."""
    found = list(duels(model))
    if not found:
        return
    yield "### Precision against deletion"
    yield ""
    head = ["budget", "best quantised", "PPL", "needle", "flips", "best reduced", "PPL", "needle", "flips", "margin"]
    rows = []
    for duel in found:
        cells_of = (
            [f"`{r.method}`", number(r.perplexity, 3), share(r.needle_accuracy), share(r.flips)]
            for r in (duel.precision, duel.deletion)
        )
        rows.append([f"{duel.budget:g}", *(cell for cells in cells_of for cell in cells), number(duel.margin)])
    yield from table(head, rows)
    spread = "; ".join(f"`{kind}` {number(value, 3)}" for kind, value in spreads(model).items())
    if spread:
        yield f"Largest minus smallest perplexity over the bases: {spread}."
        yield ""


def across_lines(models: list[ModelReport]) -> Iterator[str]:
    """What is claimed of INT4 and of grouped heads, a line per model, the least grouped first."""
    margins = {model.model: {duel.budget: number(duel.margin) for duel in duels(model)} for model in models}
    budgets = sorted({budget for found in margins.values() for budget in found})
    if not budgets:
        return
    kinds = (f"int{MAIN_BUDGET}-channel", f"int{MAIN_BUDGET}-token")
    rows = []
    for model in sorted(models, key=lambda m: m.group):
        perplexities = {row.method: row.perplexity for row in model.rows}
        spread = spreads(model)
        precision, rank = (best_at(model, MAIN_BUDGET, family) for family in ("quantisation", "rank"))
        alone = Duel(MAIN_BUDGET, precision, rank).margin if precision and rank else None
        cells = [number(perplexities.get(name), 3) for name in (BASELINE, *kinds)]
        cells += [" / ".join(number(spread.get(kind), 3) for kind in kinds), number(alone)]
        cells += [margins[model.model].get(budget, "") for budget in budgets]
        rows.append([model.model, f"{model.attention} {model.group}:1", *cells])
    yield "## The models side by side"
    yield ""
    yield (
        f"Perplexities; the spread over the bases is of {kinds[0]} / {kinds[1]}. Margins: perplexity of the best of "
        f"rank reduction and hybrids minus that of the best quantised method; first over rank reduction alone, at "
        f"{MAIN_BUDGET} bits."
    )
    yield ""
    head = ["model", "attention", BASELINE, *(f"`{kind}`" for kind in kinds), "spread", "margin, rank alone"]
    yield from table([*head, *(f"margin, {budget:g} bits" for budget in budgets)], rows)


def law_lines(law: Law) -> Iterator[str]:
    yield "### The perturbation law"
    yield ""
    head = ["change", "bits or rank", "points", "KL measured", "KL predicted", "ratio", "within 25 %", "ratio, σ for R"]
    yield from table(
        head,
        [
            [
                line.kind, str(line.bits), str(line.points), f"{line.measured:.3g}", f"{line.predicted:.3g}",
                number(line.ratio, 3), share(line.within_quarter), number(line.published_ratio, 3),
            ]
            for line in law.lines
        ],
    )  # fmt: skip
    head = ["bits", "KL dropped / KL quantised", "predicted", "3 · 2^(2b)"]
    yield from table(
        head, [[str(r.bits), number(r.measured, 1), number(r.predicted, 1), number(r.published, 0)] for r in law.ratios]
    )


def allocation_lines(found: Allocation) -> Iterator[str]:
    yield f"### Adaptive bits, {found.budget:g} bits per dimension"
    yield ""
    rows = [["mixed: " + ", ".join(found.formats), number(found.bits_per_dim, 3), number(found.perplexity, 4)]]
    rows.append([f"best uniform: {found.best_uniform}", number(found.best_uniform_bits, 3)])
    rows[-1].append(number(found.best_uniform_perplexity, 4))
    yield from table(["format", "bits/dim", "held-out PPL"], rows)


def server_lines(found: list[Through]) -> Iterator[str]:
    yield "### Through a running server"
    yield ""
    head = [
        "format",
        "PPL of the server",
        "PPL of the simulation",
        "difference",
        "tokens",
        "needle",
        "needle, simulation",
    ]
    yield from table(
        head,
        [
            [
                f"`{t.kv_format}`", number(t.perplexity, 4), number(t.simulated, 4), f"{t.relative_difference:+.3%}",
                f"{t.tokens:,}", share(t.needle_accuracy), share(t.simulated_needle_accuracy),
            ]
            for t in found
        ],
    )  # fmt: skip


def published_lines(report: Report) -> Iterator[str]:
    if not report.published:
        return
    yield "## Published figures"
    yield ""
    keys = sorted({key for figures in report.published.values() for key in figures})
    measured = {model.model for model in report.models}
    rows = [
        [name, "yes" if name in measured else "not yet", *(str(figures.get(key, "")) for key in keys)]
        for name, figures in report.published.items()
    ]
    yield from table(["model", "measured here", *keys], rows)


def lines(report: Report) -> Iterator[str]:
    s = report.settings
    yield "# KV cache quality"
    yield ""
    yield (
        f"Text `{s.text}`, windows of {s.window} tokens, stride {s.stride}, "
        f"calibrated on {s.calibration_tokens} tokens "
        f"of `{s.calibration}`, seed {s.seed}. Made by `{report.provenance['command']}` in {report.seconds:.0f} s."
    )
    yield ""
    yield from across_lines(report.models)
    for model in report.models:
        yield from model_lines(model)
    yield from published_lines(report)


def markdown(report: Report) -> str:
    return "\n".join(lines(report))
