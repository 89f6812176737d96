"""Compile every shipped kernel variant ahead of time, without a GPU, and say what it uses.

    python -m fraqtl_kernels.gpu.aot [--out bench/results/aot] [--quick] [--architectures 80 90 100] [--jobs 1]

For sm_80, sm_90 and sm_100: registers a thread, bytes spilled to local memory, shared memory, and what the machine
code of the inner loop holds, as `cuobjdump` and `nvdisasm` inside the Triton wheel report them. Writes
registers.json, registers.md and roofline.md. Triton's interpreter must be off. What Triton has in its cache isn't
compiled again.

The launchers themselves are called, with small tensors in main memory, and what they would launch is compiled: so
the table holds their launch shapes, alignments and constants.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fraqtl_kernels.constants import IDENTITY, LayerConstants, Transform
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import FORMATS, HEAD_SIZES
from fraqtl_kernels.gpu.decode import decode
from fraqtl_kernels.gpu.gather import dequantize
from fraqtl_kernels.gpu.kernels.combine import combine_kernel
from fraqtl_kernels.gpu.kernels.decode import attend_kernel
from fraqtl_kernels.gpu.kernels.gather import workspace_kernel
from fraqtl_kernels.gpu.kernels.prepared import prepare_kernel
from fraqtl_kernels.gpu.kernels.transposed import attend_columns_kernel
from fraqtl_kernels.gpu.kernels.write import write_kernel
from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.gpu.plan import plan_decode
from fraqtl_kernels.gpu.prefill import prefill
from fraqtl_kernels.gpu.tuning import Tuning, transposed_tuning
from fraqtl_kernels.gpu.write import write
from fraqtl_kernels.pages import PageLayout

ARCHITECTURES = (80, 90, 100)
MAIN_HEAD_SIZES = (64, 128)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Of the inline unpack: 16-bit floats whose last place is 1, as the PTX's logic operations or permutations take them
MAGIC_NUMBERS = ("0x64006400", "0x43434343", "0x43004300", "0x64646464")
KV_HEADS, GROUP, REQUESTS, TOKENS = 8, 4, 2, 256
ONE_BUFFER = Tuning(tile=128, warps=4, stages=4, registers=255)  # what decoding had: kept as the control
OTHER_FORMATS = ("k8v8", "k8v4", "k4v3", "k3v3", "k4v2", "k4v4-channel")


@dataclass(frozen=True)
class Gpu:
    """What the vendor states: memory bandwidth in bytes a second, multiprocessors of four schedulers, clock in Hz."""

    name: str
    bandwidth: float
    sms: int = 132
    clock: float = 1.755e9

    def instructions(self, width: int) -> float:
        """Warp instructions that can be issued in the time in which `width` bytes are read."""
        return self.sms * 4 * self.clock * width / self.bandwidth


GPUS = (Gpu("H100", 3.35e12), Gpu("H200", 4.8e12))


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: 8 KV heads of 4 query heads. options: "plain" without constants of calibration,
    "direct" without splits, "masked" with a window, a soft-cap and sink logits, "half" with fp16 inside. tuning: None
    for the launcher's own.
    """

    kernel: str
    format: str
    dtype: str
    head_size: int
    block_size: int = 16
    queries: int = 1
    options: tuple[str, ...] = ()
    tuning: Tuning | None = None

    @property
    def name(self) -> str:
        parts = (self.kernel, self.format, self.dtype, f"D{self.head_size}", f"N{self.block_size}", f"Q{self.queries}")
        return "-".join((*parts, *self.options))


@dataclass(frozen=True)
class Usage:
    """What a compiled variant uses.

    spills: bytes of local memory a thread. tile: keys of an iteration of the inner loop, 0 for kernels without
    tiles. unpack: the PTX holds the inline unpack. tf32: it holds a TF32 product. The rest as in `Loop`.
    """

    variant: str
    architecture: int
    registers: int
    spills: int
    shared: int
    warps: int
    tile: int
    loop: int
    barriers: int
    wait: int
    buffers: int
    unpack: bool
    tf32: bool

    @property
    def per_token(self) -> float:
        """Warp instructions of the inner loop for one key of one KV head, all warps of a program together."""
        return self.loop * self.warps / self.tile if self.tile else 0.0


@dataclass(frozen=True)
class Loop:
    """The machine code of an inner loop, for one tile of keys.

    loop: instructions (0: fully unrolled or no loop). barriers: how often the warps of a program wait for one another.
    wait: groups of asynchronous copies still in flight when an iteration starts on its own tile. buffers: tiles that
    shared memory holds for that; with one, every iteration waits for the copies that the one before has just started.
    """

    loop: int = 0
    barriers: int = 0
    wait: int = 0
    buffers: int = 0


def variants(quick: bool = False) -> Iterator[Variant]:
    """Every variant that is compiled; `quick`: what decoding with the default format takes at head size 128."""
    for dtype in DTYPES:
        for kernel, size in product(("decode", "transposed", "write"), (128,) if quick else HEAD_SIZES):
            yield Variant(kernel, "k4v4", dtype, size)
            if size not in MAIN_HEAD_SIZES:
                yield Variant(kernel, "k3v3", dtype, size)
        for size in () if quick else MAIN_HEAD_SIZES:
            yield from _main_variants(dtype, size)
    if quick:
        return
    yield Variant("decode", "k4v4", "bf16", 128, options=("one-buffer",), tuning=ONE_BUFFER)
    for size in MAIN_HEAD_SIZES:
        yield from _half_variants(size)


def _main_variants(dtype: str, size: int) -> Iterator[Variant]:
    """All kernels, options and formats, at the head sizes that most models have."""
    for kernel in ("combine", "prefill", "workspace"):
        yield Variant(kernel, "k4v4", dtype, size)
    for option in ("plain", "direct", "masked"):
        yield Variant("decode", "k4v4", dtype, size, options=(option,))
    yield Variant("decode", "k4v4", dtype, size, queries=8)
    yield Variant("decode", "k4v4", dtype, size, block_size=64)
    yield Variant("decode", dtype, dtype, size)
    for kernel, name in product(("decode", "transposed", "write"), OTHER_FORMATS):
        yield Variant(kernel, name, dtype, size)
    yield Variant("prepare", "k4v4", dtype, size)
    yield Variant("transposed", dtype, dtype, size)


def _half_variants(size: int) -> Iterator[Variant]:
    """The transposed form of bf16 models with fp16 inside."""
    for name in ("k4v4", *OTHER_FORMATS):
        yield Variant("transposed", name, "bf16", size, options=("half",))
    for option in ("plain", "masked"):
        yield Variant("transposed", "k4v4", "bf16", size, options=(option, "half"))
    for queries in (2, 4, 8):
        yield Variant("transposed", "k4v4", "bf16", size, queries=queries, options=("half",))


def _constants(variant: Variant) -> LayerConstants:
    """Constants of the right shapes, values don't matter."""
    ones = torch.ones(KV_HEADS, variant.head_size)
    if FORMATS[variant.format].needs_calibration:
        return LayerConstants.of(key_scale=ones, value_scale=ones)
    if "plain" in variant.options:
        return IDENTITY
    eye, half = (torch.eye(size).expand(KV_HEADS, size, size) for size in (variant.head_size, variant.head_size // 2))
    format = FORMATS[variant.format]
    key, value = (Transform(ones, eye, eye, half if x.has_feedback else None) for x in (format.k, format.v))
    return LayerConstants.of(key, value, ones)


def _attention(variant: Variant, pool: torch.Tensor, layout: PageLayout, operands: LayerOperands) -> None:
    """Launch attention as the variant says."""
    tokens = variant.queries * REQUESTS
    query = torch.zeros(tokens, KV_HEADS * GROUP, variant.head_size, dtype=DTYPES[variant.dtype])
    table = torch.zeros(REQUESTS, TOKENS, dtype=torch.int32)
    start = torch.arange(0, tokens + 1, variant.queries, dtype=torch.int32)
    batch = (query, pool, layout, table, start, torch.full((REQUESTS,), TOKENS, dtype=torch.int32))
    scoring: Any = {"scale": 1.0}
    if "masked" in variant.options:
        scoring |= {"window": 64, "soft_cap": 30.0, "sink_logits": torch.zeros(KV_HEADS * GROUP)}
    if variant.kernel == "prefill":
        prefill(*batch, variant.queries, torch.empty_like(query), operands, ptx=True, **scoring)
        return
    tuning = variant.tuning
    if variant.kernel in ("transposed", "prepare"):
        tuning = tuning or transposed_tuning(layout, variant.queries * GROUP, half="half" in variant.options)
    plan = plan_decode(
        layout,
        requests=REQUESTS,
        queries=variant.queries,
        query_heads=KV_HEADS * GROUP,
        kv_heads=KV_HEADS,
        max_seq_len=1 if "direct" in variant.options else 1 << 20,
        num_sms=132,
        tuning=tuning,
    )
    scratch = torch.empty(plan.scratch_floats(variant.head_size))
    decode(*batch, torch.empty_like(query), plan, operands, scratch, ptx=True, **scoring)


def _write(variant: Variant, pool: torch.Tensor, layout: PageLayout, operands: LayerOperands) -> None:
    key, value = torch.zeros(2, TOKENS, KV_HEADS, variant.head_size, dtype=DTYPES[variant.dtype])
    write(pool, layout, key, value, torch.arange(TOKENS), operands)


def _workspace(variant: Variant, pool: torch.Tensor, layout: PageLayout, operands: LayerOperands) -> None:
    key, value = torch.zeros(2, TOKENS, KV_HEADS, variant.head_size, dtype=DTYPES[variant.dtype])
    integers = torch.zeros(REQUESTS + 1, TOKENS, dtype=torch.int32)
    dequantize(pool, layout, integers, integers[:-1, 0], integers[:, 0], TOKENS, key, value, operands)


KERNELS: dict[str, tuple[JITFunction, Callable[[Variant, torch.Tensor, PageLayout, LayerOperands], None]]] = {
    "decode": (attend_kernel, _attention),
    "transposed": (attend_columns_kernel, _attention),
    "prepare": (prepare_kernel, _attention),
    "combine": (combine_kernel, _attention),
    "prefill": (attend_kernel, _attention),
    "write": (write_kernel, _write),
    "workspace": (workspace_kernel, _workspace),
}


class NoGpu:
    """What Triton asks of a driver before it launches anything. Kernels are cached by device, so each target is one."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_variant(variant: Variant, architecture: int) -> tuple[Any, int]:
    """What the launcher would launch, compiled for sm_<architecture>, whose `asm` holds ttgir, ptx and cubin; and the
    keys of a tile, 0 for kernels without tiles."""
    kernel, launch = KERNELS[variant.kernel]
    layout = PageLayout(FORMATS[variant.format], variant.head_size, variant.block_size)
    width = layout.format.bytes_per_token(variant.head_size)
    pool = torch.zeros(TOKENS // variant.block_size, KV_HEADS, variant.block_size, width, dtype=torch.uint8)
    operands = LayerOperands.of(layout.format, variant.head_size, DTYPES[variant.dtype], "cpu", _constants(variant))
    with compiled_only(architecture) as launched:
        launch(variant, pool, layout, operands)
    ((compiled, tile),) = launched[kernel]
    return compiled, tile


@contextmanager
def compiled_only(architecture: int) -> Iterator[dict[JITFunction, list[tuple[Any, int]]]]:
    """Kernels are compiled for sm_<architecture> and not launched. Yields what was compiled by kernel, as
    `compile_variant` returns it."""
    launched: dict[JITFunction, list[tuple[Any, int]]] = defaultdict(list)
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **options: Any) -> None:
        tile = options["SHAPE"].TILE if self in (attend_kernel, attend_columns_kernel) else 0
        launched[self].append((run(self, *args, **options | {"warmup": True}), tile))

    driver.set_active(NoGpu(architecture))
    with replaced(JITFunction, "run", compile_only):
        yield launched


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` in this block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure(variant: Variant, architecture: int) -> Usage:
    """Compile and read the resource usage."""
    compiled, tile = compile_variant(variant, architecture)
    report = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", report)[-1]) for key in ("REG", "STACK", "LOCAL"))
    return Usage(
        variant=variant.name,
        architecture=architecture,
        registers=registers,
        spills=max(stack, local),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        tile=tile,
        **asdict(inner_loop(_tool("nvdisasm", compiled.asm["cubin"], "-c"))),
        unpack=any(magic in compiled.asm["ptx"] for magic in MAGIC_NUMBERS),
        tf32=".tf32" in compiled.asm["ptx"],
    )


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """Output of a tool of the Triton wheel on a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def inner_loop(sass: str) -> Loop:
    """The shortest loop that holds a tensor-core product."""
    lines = sass.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        body = lines[labels[jump.group(1)] : end] if jump and labels.get(jump.group(1), end) < end else []
        if any("MMA" in text for text in body):
            loops.append(_read_loop(body))
    return min(loops, key=lambda loop: loop.loop, default=Loop())


def _read_loop(body: list[str]) -> Loop:
    """What one loop holds. Copies are closed off in groups (LDGDEPBAR); DEPBAR.LE waits until at most N are open."""
    groups = sum("LDGDEPBAR" in line for line in body)
    waits = [int(m.group(1), 16) for line in body if (m := re.search(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", line))]
    wait = min(waits, default=0)
    return Loop(
        loop=sum(bool(re.search(r"/\*[0-9a-f]{4,}\*/", line)) for line in body),
        barriers=sum("BAR.SYNC" in line for line in body),
        wait=wait,
        buffers=1 + wait // groups if groups else 0,
    )


def table(usages: list[Usage]) -> str:
    """A Markdown table: one row a variant, and for every architecture registers, spilled bytes, shared bytes, tiles in
    flight and warp instructions a key."""
    rows: dict[str, dict[int, Usage]] = {}
    for usage in usages:
        rows.setdefault(usage.variant, {})[usage.architecture] = usage
    architectures = sorted({u.architecture for u in usages})
    head = " | ".join(f"sm_{a}: registers, spills, shared, buffers, instructions a key" for a in architectures)
    lines = [f"| variant | warps | {head} |", "|---|---|" + "---|" * len(architectures)]
    for name, by_arch in rows.items():
        in_order = (by_arch[a] for a in architectures)
        cells = (f"{u.registers}, {u.spills}, {u.shared}, {u.buffers}, {u.per_token:.1f}" for u in in_order)
        lines.append(f"| {name} | {next(iter(by_arch.values())).warps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def roofline(usages: list[Usage]) -> str:
    """A Markdown table: what the memory of a GPU allows for a key of one KV head, and what the decode loops take."""
    compiled = {usage.variant: usage for usage in usages if usage.architecture == 90}
    columns = ("format", "D", "bytes a key", "less than bf16", *(f"{gpu.name} allows" for gpu in GPUS))
    head = (*columns, "queries as rows", "as columns", f"share of the {GPUS[-1].name}'s issue slots")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for size, name in product(MAIN_HEAD_SIZES, ("bf16", "k4v4", *OTHER_FORMATS)):
        width = FORMATS[name].bytes_per_token(size)
        end = f"{name}-bf16-D{size}-N16-Q1"
        rows, transposed = (
            compiled[f"decode-{end}"].per_token,
            compiled[f"transposed-{end}" + ("" if name == "bf16" else "-half")].per_token,
        )
        allowed = [gpu.instructions(width) for gpu in GPUS]
        numbers = (*allowed, rows, transposed)
        cells = (name, str(size), str(width), f"{FORMATS[name].ratio(size):.2f}x", *(f"{n:.1f}" for n in numbers))
        lines.append(f"| {' | '.join(cells)} | {100 * transposed / allowed[-1]:.0f} % |")
    return "\n".join(lines) + "\n"


def _kept(table_file: Path, replaced: set[str]) -> list[Usage]:
    """What a table has of other variants. Raises ConfigError if another Triton made it."""
    record = json.loads(table_file.read_text())
    if record["triton"] != triton.__version__:
        raise ConfigError(f"{table_file} was made with Triton {record['triton']}: compile all formats anew")
    return [Usage(**usage) for usage in record["usages"] if usage["variant"] not in replaced]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/aot"))
    parser.add_argument("--quick", action="store_true", help="only decoding with the default format at head size 128")
    parser.add_argument("--formats", nargs="+", metavar="NAME", help="only these; the rest stays as --out has it")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    chosen = [v for v in variants(arguments.quick) if v.format in (arguments.formats or [v.format])]
    if not chosen:
        parser.error(f"--formats: nothing is compiled for {', '.join(arguments.formats)}: see OTHER_FORMATS")
    pairs = list(product(chosen, arguments.architectures))
    table_file = arguments.out / "registers.json"
    others = _kept(table_file, {v.name for v in chosen}) if arguments.formats else []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        usages = [*others, *pool.map(measure, *zip(*pairs, strict=True))]
    order = {v.name: i for i, v in enumerate(variants(arguments.quick))}
    usages.sort(key=lambda usage: (order[usage.variant], usage.architecture))
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"triton": triton.__version__, "usages": [asdict(u) for u in usages]}
    table_file.write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "registers.md").write_text(f"Triton {triton.__version__}\n\n{table(usages)}")
    if not arguments.quick and 90 in arguments.architectures:
        (arguments.out / "roofline.md").write_text(roofline(usages))
    print(table(usages))


if __name__ == "__main__":
    main()
