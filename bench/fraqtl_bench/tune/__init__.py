"""`fraqtl-bench tune`: which launch shapes of the decode kernel are fastest on this GPU?

Times variants (tile, warps, stages, cap on registers, programs a multiprocessor) over shapes, beside FlashAttention 3
and our own bf16 pages, each against the inputs that all share. Then what the best gains or loses with other
pages. Every measurement is one line of JSON in `--out`, written as soon as it is known: a run that is killed leaves its
lines, and `--lines FILE --table FILE` makes a table of them. `--table` is where the chosen launch shapes
go: the launcher reads the file that FRAQTL_DECODE_TUNING names.

Without a GPU, `--device cpu` runs the same in Triton's interpreter (TRITON_INTERPRET=1), to rehearse it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fraqtl_bench.gpu.lines import read_lines, usable
from fraqtl_bench.kernels.shapes import Shape
from fraqtl_bench.tune.variants import FIRST, Variant
from fraqtl_kernels.errors import ConfigError, UnsupportedError, one_of
from fraqtl_kernels.formats import FORMATS

if TYPE_CHECKING:
    from fraqtl_bench.tune.measure import Baseline

# The most important first, in case that time runs out
SHAPES = (
    "1x32768x32x8x128",
    "8x32768x32x8x128",
    "32x8192x32x8x128",
    "1x131072x32x8x128",
    "1x8192x32x8x128",
    "64x2048x32x8x128",
    "8x4096x32x8x128",
)
SECOND_SHAPES = 3  # of them, for what is tried on top of the best
BASELINES = (("fa3-bf16", 16), ("fa3-bf16", 256), ("bf16", 16))


def run(args: argparse.Namespace) -> None:
    from fraqtl_bench.tune import table

    lines = read_lines(args.lines) if args.lines else _measure(args)
    machine = next((line for line in lines if line["kind"] == "machine"), None)
    if machine is None:
        raise ConfigError(f"{args.lines}: no line says which machine it is from")
    entries = table.choose(lines, machine["multiprocessors"])
    for entry in entries:
        print(f"chosen for {machine['gpu']}: {json.dumps(entry)}")
    if args.table and entries:
        table.write(args.table, machine["gpu"], entries)
        print(f"written to {args.table}")


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from fraqtl_bench.kernels.cuda_arms import multiprocessors
    from fraqtl_bench.kernels.timing import copy_ceiling, make_timer
    from fraqtl_bench.tune import table
    from fraqtl_bench.tune.measure import Bench, sweep
    from fraqtl_bench.tune.variants import second

    _check(args)
    end = time.monotonic() + args.seconds
    device = torch.device(args.device)
    ceiling = copy_ceiling(args.device)
    lines: list[dict[str, Any]] = []
    with _open(args.out) as out:

        def sink(line: dict[str, Any]) -> None:
            lines.append(line)
            if out is not None:
                out.write(json.dumps(line) + "\n")
                out.flush()
                os.fsync(out.fileno())
            if "shape" in line:
                print(describe(line), flush=True)

        gpu = torch.cuda.get_device_name() if args.device == "cuda" else "Triton's interpreter"
        machine = {"gpu": gpu, "multiprocessors": multiprocessors(device), "copy_bytes_per_s": ceiling}
        sink({"kind": "machine", **machine, "repeats": args.repeats})
        print(f"{gpu}, a copy runs at {ceiling / 1e9:.0f} GB/s", flush=True)
        bench = Bench(make_timer(args.device), FORMATS[args.format], device, ceiling, args.repeats, end, sink)
        shapes = args.shapes or [Shape.parse(text) for text in SHAPES]
        subjects = [*_baselines(args), *(args.variants or [Variant.parse(text) for text in FIRST])]
        list(sweep(bench, shapes, subjects))
        winner = table.best(usable(lines))
        if winner is not None:
            print(f"best so far: {winner}", flush=True)
            list(sweep(bench, shapes[:SECOND_SHAPES], list(second(Variant.parse(winner)))))
    return lines


def _check(args: argparse.Namespace) -> None:
    """Raises FraqtlError for what can't run here."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda: torch finds no GPU here, choose cpu")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedError("--device cpu runs in Triton's interpreter: set TRITON_INTERPRET=1")
    if args.format not in FORMATS:
        raise one_of("KV format", args.format, FORMATS)
    for shape in args.shapes or ():
        shape.check()


def _open(path: Path | None) -> Any:
    if path is None:
        return nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def _baselines(args: argparse.Namespace) -> list[Baseline]:
    from fraqtl_bench.kernels.registry import arms_for
    from fraqtl_bench.tune.measure import Baseline

    arms = arms_for("cuda")
    names = [name for name, _ in BASELINES] if args.device == "cuda" else ["bf16"]
    return [Baseline(arms[name], block_size) for name, block_size in BASELINES if name in names]


def describe(line: dict[str, Any]) -> str:
    """One line for people."""
    if "skipped" in line:
        return f"{line['shape']:20} {line['name']}: skipped, {line['skipped']}"
    error = "" if line["kernel_error"] is None else f", error {line['kernel_error']:.1e}"
    share = f"{line['share_of_copy_bandwidth']:.0%} of a copy"
    return f"{line['shape']:20} {line['name']}: {line['median_ms']:.4f} ms, {share}{error}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="BxCxQxKxD", help="as for kernels --grid")
    parser.add_argument("--format", default="k4v4")
    parser.add_argument(
        "--variants", nargs="+", type=Variant.parse, metavar="tile=128,warps=4,...", help="launch shapes to time"
    )
    parser.add_argument("--repeats", type=int, default=40, help="calls of each (default: 40)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing new starts after so many")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--lines", type=Path, help="measure nothing, take the lines of this file")
    parser.add_argument("--table", type=Path, help="write the table of launch shapes")
    parser.set_defaults(run=run)


def add_command(commands: Any) -> None:
    add_arguments(commands.add_parser("tune", help="find the fastest launch shapes of a GPU", description=__doc__))
