"""`fraqtl-bench quantizer`: which 4-bit quantizer of keys and values loses least, at how many bytes?

Grid x rotation x centering x smoothing x choice of scale, on keys, queries and values of a model and
on synthetic ones made like known trouble. See `variants`, `cases` and `measure` for the definitions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fraqtl_bench import results
from fraqtl_bench.quantizer.capture import demo_model, model_case
from fraqtl_bench.quantizer.cases import synthetic_cases
from fraqtl_bench.quantizer.measure import SHIPPED, CaseResult, Measures, affordable, measure_case, overall, plain
from fraqtl_bench.quantizer.perplexity import measure_perplexity
from fraqtl_bench.quantizer.steps import STEPS
from fraqtl_bench.quantizer.variants import key_variants

HEAD_SIZES = (64, 128)
COLUMNS = {
    "shipped_first_exact": ["k_error", "output_error", "flips"],
    "shipped": ["k_error", "output_error", "flips", "v_error"],
    "steps": ["k_error", "output_error", "flips", "v_error"],
    "keys": ["k_error", "output_error", "flips"],
    "values": ["v_error", "output_error"],
    "names": ["grid", "rotation", "scale", "centring", "smoothing"],
}


def _cell(m: Measures) -> str:
    return f"{m.output_error:.1%} ({m.flips:.1%})"


def case_table(found: list[CaseResult]) -> Table:
    """A row per case: output error and flips of the plain, the shipped and the best quantizers."""
    table = Table(title="error of the attention output (share of argmax flips), at most the bytes of k4v4")
    for name in ("case", "plain INT4", SHIPPED, "best without calibration", "best", "which"):
        table.add_column(name, justify="left" if name in ("case", "which") else "right")
    for result in found:
        free, best = result.best(calibrated=False), result.best(calibrated=True)
        cells = (plain(result), result.shipped, result.keys[free], result.keys[best])
        table.add_row(result.case.name, *map(_cell, cells), best.name)
    return table


def overall_table(summary: dict[str, dict[str, dict[str, float]]], rows: int = 12) -> Table:
    """The variants with the least geometric mean over all cases, and the shipped format."""
    affordable_names = [v.name for v in key_variants() if affordable(v, 128)]
    ranked = sorted([*affordable_names, *STEPS, SHIPPED], key=lambda n: summary[n]["all"]["against_shipped"])
    chosen = [n for i, n in enumerate(ranked) if i < rows or n in (*STEPS, SHIPPED)]
    table = Table(title="output error / that of k4v4, geometric mean (at most: / own error on the Gaussian case)")
    for name in ("variant", *summary[SHIPPED]):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for name in chosen:
        cells = summary[name].values()
        table.add_row(name, *(f"{c['against_shipped']:.2f} ({c['against_own_benign']:.1f})" for c in cells))
    return table


def perplexity_table(found: dict[str, dict[str, float]]) -> Table:
    table = Table(title="perplexity with stored keys and values")
    for name in ("stored as", "perplexity", "increase", "standard error", "KL divergence"):
        table.add_column(name, justify="left" if name == "stored as" else "right")
    for name, row in found.items():
        cells = (f"{row['increase']:+.2%}", f"{row['standard_error']:.2%}", f"{row['divergence']:.5f}")
        table.add_row(name, f"{row['perplexity']:.4f}", *cells)
    return table


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    model = args.model or demo_model()
    cases = [model_case(model, args.seed), *synthetic_cases(HEAD_SIZES, args.seed)]
    with Progress() as progress:
        found = [measure_case(case) for case in progress.track(cases, description="cases")]
    summary = overall(found)
    console = Console()
    console.print(case_table(found))
    console.print(overall_table(summary))
    perplexity = measure_perplexity(model, args.seed)
    console.print(perplexity_table(perplexity))
    if args.out:
        size = {v.name: {str(d): v.bytes_per_token(d) for d in HEAD_SIZES} for v in key_variants()}
        cases_json = {r.case.name: r.as_json() for r in found}
        results.save(
            args.out,
            {
                "seed": args.seed,
                "columns": COLUMNS,
                "overall": summary,
                "bytes": size,
                "perplexity": perplexity,
                "quantiser": cases_json,
            },
        )


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "quantizer", aliases=["quantiser"], help="compare 4-bit quantizers of keys and values", description=__doc__
    )
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model (default: the demo model)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every combination as JSON")
    parser.set_defaults(run=run)
