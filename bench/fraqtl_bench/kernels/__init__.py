"""`fraqtl-bench kernels`: decode attention over paged caches, per arm and shape, timed and checked against float64.

Every arm gets several sets of fresh random inputs in rotation, together larger than the caches of the
machine, interleaved with the other arms; the median of many calls counts. On a GPU calls are replayed from CUDA
graphs, with the L2 cache read full of something else before each. `--errors` compares with float64 and times nothing;
`--write` times storing all tokens of a shape instead of attending over them. `--out` is written after every shape.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fraqtl_bench import results
from fraqtl_bench.kernels.registry import choose
from fraqtl_bench.kernels.shapes import Shape
from fraqtl_bench.kernels.sweep import Found, measure, measure_errors, print_errors, print_times
from fraqtl_bench.kernels.timing import copy_ceiling, make_timer
from fraqtl_kernels.errors import UnsupportedError

DEFAULT_GRID = {
    "cpu": ("1x4096x32x8x128", "8x4096x32x8x128", "1x16384x32x8x128", "8x2048x4x2x64"),
    "cuda": (
        "1x8192x32x8x128",
        "1x32768x32x8x128",
        "8x4096x32x8x128",
        "1x131072x32x8x128",
        "8x32768x32x8x128",
        "32x8192x32x8x128",
        "64x2048x32x8x128",
        "64x32768x32x8x128",
    ),
}
WRITE_GRID = ("1x2048x4x2x64", "1x2048x9x3x64", "1x2048x32x8x128", "1x8192x32x8x128", "1x2048x4x1x256")
ERROR_CONTEXTS = (1024, 8192, 65536, 131072)
REPEATS = {"cpu": 30, "cuda": 100}


def run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda: torch finds no GPU here, choose cpu")
    arms = choose(args.device, args.arms)
    if args.write and args.arms is None:
        arms = [arm for arm in arms if not arm.foreign]  # others can't write by themselves
    if args.errors:
        grid = args.grid or [Shape(1, n, 32, 8, 128) for n in ERROR_CONTEXTS]
    else:
        grid = args.grid or [Shape.parse(text) for text in (WRITE_GRID if args.write else DEFAULT_GRID[args.device])]
    for shape in grid:
        shape.check()
    found: dict[str, Any] = {"device": args.device, "block_size": args.block_size}
    if args.device == "cuda":
        found["gpu"] = results.gpu()

    def save(name: str, measured: dict[str, Found]) -> None:
        if args.out:
            results.save(args.out, found | {name: measured}, quiet=len(measured) < len(grid))

    if args.errors:
        print_errors(measure_errors(grid, arms, args, partial(save, "errors")))
    else:
        ceiling = copy_ceiling(args.device)
        found |= {"copy_bytes_per_s": ceiling, "torch_threads": torch.get_num_threads()}
        found["repeats"] = args.repeats or REPEATS[args.device]
        keep = partial(save, "writes" if args.write else "kernels")
        print_times(measure(grid, arms, make_timer(args.device), ceiling, found["repeats"], args, keep), ceiling)


def add_command(commands: Any) -> None:
    add_arguments(commands.add_parser("kernels", help="time the attention kernels", description=__doc__))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--grid",
        nargs="+",
        type=Shape.parse,
        metavar="BxCxQxKxD",
        help="batch x context x query heads x KV heads x head size (default: a grid for the device)",
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="what to compare (default: all of the device)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--errors", action="store_true", help="errors against float64 by context, no times")
    what.add_argument("--write", action="store_true", help="time storing the tokens, not attention")
    parser.add_argument("--repeats", type=int, help="calls of each arm (default: 30 on the CPU, 100 on a GPU)")
    parser.add_argument("--working-set", type=int, default=256, help="MiB of cache an arm rotates over (default: 256)")
    parser.add_argument("--max-sets", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=16, help="tokens a block, for every arm (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.set_defaults(run=run)
