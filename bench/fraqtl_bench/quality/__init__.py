"""`fraqtl-bench quality`: does precision beat deletion, on your model, at your budget?

Keeps the KV cache of any Hugging Face decoder in many ways of matched size (quantized, reduced in rank, both, and as
the server's formats do) and measures what each costs: perplexity, last word, needle, routing flips, divergence.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fraqtl_bench.quality.options import DEFAULT_MEASURES, MEASURES, QUICK, STANDARD
from fraqtl_bench.quality.ruler.names import RULER_TASKS

MEASURES_HELP = f"of {', '.join(MEASURES)} (default: {', '.join(DEFAULT_MEASURES)})"


def run(args: argparse.Namespace) -> None:
    # transformers takes seconds to import, so the other commands don't
    from fraqtl_bench.quality.command import run as run_lab

    run_lab(args)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "quality", help="what quantisation and rank reduction cost a model", description=__doc__
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder, Hub name or `demo` (the default)")
    parser.add_argument("--suite", type=Path, help="YAML file with models and options, such as bench/paper.yaml")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder of the report (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
    parser.add_argument(
        "--notes", type=Path, metavar="FILE", help="go on with what FILE notes, and keep it: for another --budget"
    )
    parser.add_argument("--quick", action="store_true", help="few methods on little text, within two minutes")
    _add_texts(parser)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="instead of the standard set")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, metavar="MEASURE", help=MEASURES_HELP)
    _add_ruler(parser)
    parser.add_argument(
        "--budget", type=float, metavar="BITS", help="also search the best formats per layer for a budget"
    )
    parser.add_argument("--through-server", nargs="+", metavar="URL", help="also measure through running servers")
    parser.add_argument(
        "--server-calibration", type=Path, metavar="FILE", help="constants to simulate with: the file its log names"
    )
    parser.add_argument(
        "--no-server-residual",
        dest="server_residual",
        action="store_false",
        help="the servers were started with --no-kv-residual",
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, else the model's)")
    parser.add_argument("--device", default=None, help="torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--no-figures", action="store_true", help="leave the PNG files out (they need matplotlib)")
    parser.set_defaults(run=run)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    defaults = {name: f"(default: {STANDARD[name]}, quick: {QUICK[name]})" for name in STANDARD}
    parser.add_argument("--text", help="`generated`, `wikitext` or a UTF-8 file (default: generated)")
    parser.add_argument("--calibration", help="the same, for calibration (default: as --text, other parts of it)")
    parser.add_argument("--last-word", help="`generated`, `lambada` or a file, a passage a line (default: generated)")
    parser.add_argument("--window", type=int, help=f"tokens a window {defaults['window']}")
    parser.add_argument("--stride", type=int, help=f"tokens between windows {defaults['stride']}")
    parser.add_argument("--tokens", type=int, help=f"scored at most, 0 for all {defaults['tokens']}")
    parser.add_argument("--calibration-tokens", type=int, help=defaults["calibration_tokens"])
    parser.add_argument("--passages", type=int, help=f"of the last-word task {defaults['passages']}")
    parser.add_argument("--needle-lengths", nargs="+", type=int, help=f"in tokens {defaults['needle_lengths']}")
    parser.add_argument("--needle-repeats", type=int, help=f"a length and depth {defaults['needle_repeats']}")


def _add_ruler(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(RULER_TASKS)
    lengths, repeats = (f"(default: {STANDARD[n]}, quick: {QUICK[n]})" for n in ("ruler_lengths", "ruler_repeats"))
    parser.add_argument("--ruler-tasks", nargs="+", metavar="TASK", help=f"of {names} (default: all)")
    parser.add_argument("--ruler-lengths", nargs="+", type=int, help=f"in tokens, with the reply {lengths}")
    parser.add_argument("--ruler-repeats", type=int, help=f"a task and length {repeats}")
