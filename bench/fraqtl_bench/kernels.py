"""`fraqtl-bench kernels`: decode attention over packed pages, per format and shape, against a baseline.

Every arm runs on several sets of fresh random inputs in rotation, together larger than the caches
of the machine, interleaved with the other arms; the median of many calls counts. The baseline is
torch's scaled_dot_product_attention over contiguous bfloat16 keys and values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fraqtl_bench import results
from fraqtl_kernels import cpu, reference
from fraqtl_kernels.errors import ConfigError, UnsupportedError
from fraqtl_kernels.formats import FORMATS, get_format
from fraqtl_kernels.pages import PageLayout

BLOCK_SIZE = 16
BASELINE = "sdpa-bf16"


@dataclass(frozen=True)
class Shape:
    """One point of the grid: requests x cached tokens, query heads / KV heads, head size."""

    batch: int
    context: int
    query_heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`8x4096x32x8x128`: batch, context, query heads, KV heads, head size."""
        try:
            values = [int(part) for part in text.split("x")]
            return cls(*values)
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give batch x context x query heads x KV heads x head size, such as 8x4096x32x8x128"
            ) from None

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}x{self.query_heads}x{self.kv_heads}x{self.head_size}"


@dataclass
class Prepared:
    """A set of inputs for one arm: what to call, and how far its result is from the reference."""

    call: Callable[[], Any]
    error: float


def prepare_packed(name: str, shape: Shape, generator: torch.Generator) -> Prepared:
    """Our decode over pages of format `name`, in shuffled blocks."""
    layout = PageLayout(get_format(name), shape.head_size, BLOCK_SIZE)
    blocks = shape.batch * -(-shape.context // BLOCK_SIZE)
    width = layout.format.bytes_per_token(shape.head_size)
    pool = torch.zeros(blocks, shape.kv_heads, BLOCK_SIZE, width, dtype=torch.uint8)
    table = torch.randperm(blocks, generator=generator).view(shape.batch, -1).int()
    for r in range(shape.batch):
        key, value = _random_kv(shape, generator)
        token = torch.arange(shape.context)
        slots = table[r, token // BLOCK_SIZE].long() * BLOCK_SIZE + token % BLOCK_SIZE
        cpu.write(pool, layout, key, value, slots)
    query = torch.randn(shape.batch, shape.query_heads, shape.head_size, generator=generator).bfloat16()
    lengths = [shape.context] * shape.batch
    starts = list(range(shape.batch + 1))
    plan = cpu.plan_attention(starts, lengths)
    output = torch.empty_like(query)
    scale = shape.head_size**-0.5

    def call() -> None:
        cpu.attend(query, pool, layout, table, plan, output, scale=scale)

    call()
    # The reference is slow: one request is enough, each is computed by the same code.
    expected = reference.paged_attention(
        query[:1], pool, layout, table[:1], torch.tensor([0, 1]), torch.tensor(lengths[:1]), scale=scale
    )
    return Prepared(call, _relative_error(output[:1], expected))


def prepare_sdpa(shape: Shape, generator: torch.Generator) -> Prepared:
    """The baseline: contiguous bf16 keys and values, one call for the batch."""
    pairs = [_random_kv(shape, generator) for _ in range(shape.batch)]
    key, value = (torch.stack([pair[i].transpose(0, 1) for pair in pairs]).bfloat16().contiguous() for i in (0, 1))
    query = torch.randn(shape.batch, shape.query_heads, 1, shape.head_size, generator=generator).bfloat16()

    def call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    group = shape.query_heads // shape.kv_heads
    k, v = (x[0].double().repeat_interleave(group, 0) for x in (key, value))
    weights = (query[0].double() @ k.transpose(-1, -2) * shape.head_size**-0.5).softmax(-1)
    return Prepared(call, _relative_error(call()[0], weights @ v))


def _random_kv(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    size = (shape.context, shape.kv_heads, shape.head_size)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def _relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def bytes_read(arm: str, shape: Shape) -> int:
    """Bytes of cached keys and values (scales included) that one call must read."""
    per_token = 4 * shape.head_size if arm == BASELINE else get_format(arm).bytes_per_token(shape.head_size)
    return shape.batch * shape.context * shape.kv_heads * per_token


def measure(shape: Shape, arms: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of every arm at one shape, arms taking turns."""
    generator = torch.Generator().manual_seed(args.seed)
    prepared: dict[str, list[Prepared]] = {}
    for arm in arms:
        sets = max(1, -(-args.working_set * 2**20 // bytes_read(arm, shape)))
        prepare = (
            (lambda a: prepare_sdpa(shape, generator))
            if arm == BASELINE
            else (lambda a: prepare_packed(a, shape, generator))
        )
        prepared[arm] = [prepare(arm) for _ in range(min(sets, args.max_sets))]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(args.repeats):
        for arm in arms:
            call = prepared[arm][i % len(prepared[arm])].call
            start = time.perf_counter()
            call()
            seconds[arm].append(time.perf_counter() - start)
    found = {}
    for arm in arms:
        median = statistics.median(seconds[arm])
        size = bytes_read(arm, shape)
        found[arm] = {
            "median_ms": median * 1e3,
            "fastest_ms": min(seconds[arm]) * 1e3,
            "bytes": size,
            "gb_per_s": size / median / 1e9,
            "relative_error": max(p.error for p in prepared[arm]),
            "input_sets": len(prepared[arm]),
        }
    for entry in found.values():
        entry["speed_against_baseline"] = found[BASELINE]["median_ms"] / entry["median_ms"]
    return found


def copy_ceiling() -> float:
    """Bytes a second of a large torch copy, read and write counted."""
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(times)


def run(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        raise UnsupportedError("--device cuda: the GPU arms are not written yet, choose cpu")
    for shape in args.grid:
        if shape.query_heads % shape.kv_heads:
            raise ConfigError(f"{shape}: the query heads must be a multiple of the KV heads")
    arms = [BASELINE, *(get_format(name).name for name in args.formats)]
    ceiling = copy_ceiling()
    measured = {}
    with Progress() as progress:
        for shape in progress.track(args.grid, description="shapes"):
            measured[str(shape)] = measure(shape, arms, args)
    table = Table(title=f"decode attention, ms (speed against {BASELINE}); copies run at {ceiling / 1e9:.1f} GB/s")
    table.add_column("batch x context x heads x KV heads x head size")
    for arm in arms:
        table.add_column(arm, justify="right")
    for name, found in measured.items():
        cells = (f"{found[arm]['median_ms']:.2f} ({found[arm]['speed_against_baseline']:.2f}x)" for arm in arms)
        table.add_row(name, *cells)
    Console().print(table)
    if args.out:
        threads = torch.get_num_threads()
        results.save(args.out, {"kernels": measured, "copy_bytes_per_s": ceiling, "torch_threads": threads})


def add_command(commands: Any) -> None:
    parser = commands.add_parser("kernels", help="time the attention kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    default = ["1x4096x32x8x128", "1x16384x32x8x128", "8x4096x32x8x128", "8x2048x4x2x64"]
    parser.add_argument(
        "--grid", nargs="+", type=Shape.parse, default=[Shape.parse(s) for s in default], metavar="BxCxQxKxD"
    )
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--working-set", type=int, default=256, help="MiB of cache an arm rotates over (default: 256)")
    parser.add_argument("--max-sets", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.set_defaults(run=run)
