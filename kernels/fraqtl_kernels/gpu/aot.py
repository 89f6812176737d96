"""Compile every shipped kernel variant ahead of time, without a GPU, and say what it uses.

    python -m fraqtl_kernels.gpu.aot [--out bench/results/aot] [--quick] [--architectures 80 90 100]

For sm_80, sm_90 and sm_100: registers a thread, bytes spilled to local memory, shared memory, and the
instructions of the inner loop, as the `cuobjdump` inside the Triton wheel reports them. Writes
registers.json and registers.md. Triton's interpreter must be off.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fraqtl_kernels.formats import FORMATS, HEAD_SIZES
from fraqtl_kernels.gpu.combine import combine_kernel
from fraqtl_kernels.gpu.config import Tuning, attention_constants, half_of, rows_for, vector_constants
from fraqtl_kernels.gpu.decode import decode_kernel, decode_tuning, deferred
from fraqtl_kernels.gpu.prefill import ROWS as PREFILL_ROWS
from fraqtl_kernels.gpu.prefill import prefill_kernel, prefill_tuning
from fraqtl_kernels.gpu.workspace import TILE as WORKSPACE_TILE
from fraqtl_kernels.gpu.workspace import workspace_kernel
from fraqtl_kernels.gpu.write import TOKENS, write_kernel, write_tuning
from fraqtl_kernels.pages import PageLayout

ARCHITECTURES = (80, 90, 100)
MAIN_HEAD_SIZES = (64, 128)
MAGIC_NUMBERS = ("0x64006400", "0x43434343", "0x64646464")  # of the inline unpack
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_TYPES = {
    "pool": "*u8",
    "block_table": "*i32",
    "query_start": "*i32",
    "lengths": "*i32",
    "slot_mapping": "*i64",
    "first": "*i32",
    "target_start": "*i32",
    "partial": "*fp32",
    "log_sums": "*fp32",
    "centre": "*fp32",
    "scale": "fp32",
    "soft_cap": "fp32",
    "factor": "fp32",
    "pool_stride_block": "i64",
}
_INTEGERS = ("requests", "splits", "programs", "window", "tokens", "longest")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched."""

    kernel: str
    format: str
    dtype: str
    head_size: int
    block_size: int = 16
    rows: int = 16
    options: tuple[str, ...] = ()  # HAS_WINDOW, HAS_CAP, HAS_SINKS, HAS_CENTRE, DIRECT

    @property
    def layout(self) -> PageLayout:
        return PageLayout(FORMATS[self.format], self.head_size, self.block_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16}[self.dtype]

    @property
    def name(self) -> str:
        parts = (self.kernel, self.format, self.dtype, f"D{self.head_size}", f"N{self.block_size}", f"M{self.rows}")
        return "-".join((*parts, *self.options))


@dataclass(frozen=True)
class Usage:
    """What a compiled variant uses.

    spills: bytes of local memory a thread. loop: instructions of the inner loop (0: fully unrolled or none).
    unpack: the PTX holds the inline unpack. tf32: it holds a TF32 product.
    """

    variant: str
    architecture: int
    registers: int
    spills: int
    shared: int
    warps: int
    loop: int
    unpack: bool
    tf32: bool


def variants(quick: bool = False) -> Iterator[Variant]:
    """Every variant that is compiled; `quick`: only the default format on the main head sizes."""
    for dtype in ("fp16", "bf16"):
        for size in MAIN_HEAD_SIZES if quick else HEAD_SIZES:
            yield Variant("decode", "k4v4", dtype, size)
            yield Variant("write", "k4v4", dtype, size)
        for size in MAIN_HEAD_SIZES:
            yield Variant("combine", "k4v4", dtype, size)
            yield Variant("decode", "k4v4", dtype, size, options=("DIRECT",))
        if quick:
            continue
        for size in MAIN_HEAD_SIZES:
            for name in ("k8v8", "k8v4", dtype):
                yield Variant("decode", name, dtype, size)
            yield Variant("workspace", "k4v4", dtype, size)
            yield Variant("prefill", "k4v4", dtype, size, rows=PREFILL_ROWS)
            yield Variant("decode", "k4v4", dtype, size, options=("HAS_WINDOW", "HAS_CAP", "HAS_SINKS", "HAS_CENTRE"))
            yield Variant("decode", "k4v4", dtype, size, block_size=64)
            yield Variant("decode", "k4v4", dtype, size, rows=64)


def _decode(variant: Variant) -> tuple[Any, dict[str, Any], Tuning]:
    tuning = decode_tuning(variant.layout, variant.rows)
    constants = attention_constants(variant.layout, variant.torch_dtype, ptx=True) | {
        "QUERIES": variant.rows // 4,
        "GROUP": 4,
        "ROWS": rows_for(variant.rows),
        "TILE": tuning.tile,
        "DEFERRED": deferred(variant.rows, tuning.tile),
        "STAGES": tuning.stages,
    }
    return decode_kernel, constants, tuning


def _combine(variant: Variant) -> tuple[Any, dict[str, Any], Tuning]:
    constants = {
        "QUERIES": variant.rows // 4,
        "GROUP": 4,
        "ROWS": rows_for(variant.rows),
        "TILE": decode_tuning(variant.layout, variant.rows).tile,
        "HEAD": variant.head_size,
        "HALF": half_of(variant.head_size),
        "V_ROTATED": variant.layout.format.v.rotated,
    }
    return combine_kernel, constants, Tuning(0, 4, 3)


def _write(variant: Variant) -> tuple[Any, dict[str, Any], Tuning]:
    rotated = {"K_ROTATED": variant.layout.format.k.rotated, "V_ROTATED": variant.layout.format.v.rotated}
    constants = vector_constants(variant.layout, variant.torch_dtype) | rotated | {"TOKENS": TOKENS}
    return write_kernel, constants, write_tuning(variant.head_size)


def _workspace(variant: Variant) -> tuple[Any, dict[str, Any], Tuning]:
    _, constants, _ = _write(variant)
    return workspace_kernel, constants | {"TILE": WORKSPACE_TILE}, Tuning(WORKSPACE_TILE, 4, 3)


def _prefill(variant: Variant) -> tuple[Any, dict[str, Any], Tuning]:
    tuning = prefill_tuning(variant.layout)
    constants = attention_constants(variant.layout, variant.torch_dtype, ptx=True) | {
        "GROUP": 4,
        "ROWS": PREFILL_ROWS,
        "TILE": tuning.tile,
        "DEFERRED": deferred(PREFILL_ROWS, tuning.tile),
        "STAGES": tuning.stages,
    }
    return prefill_kernel, constants, tuning


KERNELS = {
    "decode": _decode,
    "combine": _combine,
    "write": _write,
    "workspace": _workspace,
    "prefill": _prefill,
}


def compile_variant(variant: Variant, architecture: int) -> tuple[Any, Tuning]:
    """Triton's compiled kernel (its `asm` holds ptx and cubin) for sm_<architecture>."""
    kernel, constants, tuning = KERNELS[variant.kernel](variant)
    names = kernel.arg_names
    flags = {n: n in variant.options for n in names if n == "DIRECT" or n.startswith("HAS_")}
    constants = {k: v for k, v in (constants | flags).items() if k in names}
    signature = {n: "constexpr" if n in constants else _type_of(n, variant.torch_dtype) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or "stride" in n}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    options = {"num_warps": tuning.warps} | ({"maxnreg": tuning.registers} if tuning.registers else {})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options), tuning


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in _TYPES:
        return _TYPES[name]
    return "i32" if name in _INTEGERS or "stride" in name else _POINTERS[dtype]


def measure(variant: Variant, architecture: int) -> Usage:
    """Compile and read the resource usage."""
    compiled, tuning = compile_variant(variant, architecture)
    report = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", report)[-1]) for key in ("REG", "STACK", "LOCAL"))
    return Usage(
        variant=variant.name,
        architecture=architecture,
        registers=registers,
        spills=max(stack, local),
        shared=compiled.metadata.shared,
        warps=tuning.warps,
        loop=_loop_length(_tool("nvdisasm", compiled.asm["cubin"], "-c")),
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


def _loop_length(sass: str) -> int:
    """Instructions of the shortest loop that holds a tensor-core product; 0 without one."""
    lines = sass.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    lengths = []
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        body = lines[labels[jump.group(1)] : end] if jump and labels.get(jump.group(1), end) < end else []
        if any("MMA" in text for text in body):
            lengths.append(sum(bool(re.search(r"/\*[0-9a-f]{4,}\*/", text)) for text in body))
    return min(lengths, default=0)


def table(usages: list[Usage]) -> str:
    """A Markdown table: one row a variant, registers / spilled bytes / shared bytes for every architecture."""
    rows: dict[str, dict[int, Usage]] = {}
    for usage in usages:
        rows.setdefault(usage.variant, {})[usage.architecture] = usage
    architectures = sorted({u.architecture for u in usages})
    head = " | ".join(f"sm_{a}: registers, spills, shared" for a in architectures)
    lines = [f"| variant | warps | {head} |", "|---|---|" + "---|" * len(architectures)]
    for name, by_arch in rows.items():
        found = (by_arch.get(a) for a in architectures)
        cells = (f"{u.registers}, {u.spills}, {u.shared}" if u else "not compiled yet" for u in found)
        lines.append(f"| {name} | {next(iter(by_arch.values())).warps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/aot"))
    parser.add_argument("--quick", action="store_true", help="the default format on the main head sizes only")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    usages = [measure(v, a) for v in variants(arguments.quick) for a in arguments.architectures]
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"triton": triton.__version__, "usages": [asdict(u) for u in usages]}
    (arguments.out / "registers.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "registers.md").write_text(f"Triton {triton.__version__}\n\n{table(usages)}")
    print(table(usages))


if __name__ == "__main__":
    main()
