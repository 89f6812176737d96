"""Kernels compiled for GPUs that aren't here: nothing spills, the unpack is inline PTX, no product is TF32, and
decoding loads a tile while it works on the one before.

FRAQTL_AOT=all compiles every variant; without it those of decoding and writing with the default format at head
size 128, and the committed table is checked for the rest. Both for all three architectures.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.gpu import aot
from tests.kernels.gpu.conftest import interpreter_only

pytestmark = interpreter_only  # minutes of compiling for other GPUs

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "aot" / "registers.json"
PERFORMANCE = Path(__file__).parents[3] / "docs" / "performance.md"
READING = ("decode", "transposed", "prefill")  # kernels that unpack codes into products
SPILLS = {("decode-k8v8-bf16-D128-N16-Q1", 100): 8}  # bytes
WITHOUT_UNPACK = ("fp16", "bf16", "k8v8-bf16")  # raw vectors; 8-bit codes in bf16, which the portable way converts
BUDGET = 20  # warp instructions a key at head size 128 with 4 query heads, which an H200 has for the memory's speed


def check(usages: list[dict[str, Any]], variants: list[aot.Variant]) -> None:
    """Every variant is there once for every architecture, and none breaks a promise."""
    expected = {(v.name, a) for v in variants for a in aot.ARCHITECTURES}
    assert len(usages) == len(expected)
    assert {(u["variant"], u["architecture"]) for u in usages} == expected
    by_name = {v.name: v for v in variants}
    for usage in usages:
        variant = by_name[usage["variant"]]
        assert not usage["tf32"], usage
        if variant.head_size in aot.MAIN_HEAD_SIZES:
            assert usage["spills"] == SPILLS.get((variant.name, usage["architecture"]), 0), usage
        computed = "fp16" if "half" in variant.options else variant.dtype
        unpacks = variant.kernel in READING and not f"{variant.format}-{computed}".startswith(WITHOUT_UNPACK)
        assert usage["unpack"] == unpacks, usage
        if variant.kernel in ("decode", "transposed") and variant.head_size in aot.MAIN_HEAD_SIZES:
            buffers = 1 if variant.tuning == aot.ONE_BUFFER else 2
            assert usage["buffers"] == buffers and (usage["wait"] > 0) == (buffers > 1), usage
        if (variant.kernel, variant.format, variant.head_size, variant.queries) == ("transposed", "k4v4", 128, 1):
            assert aot.Usage(**usage).per_token <= BUDGET or "masked" in variant.options, usage


def test_one_format_is_compiled_into_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest stays, in the order of all variants. Not if another Triton made it."""
    table = tmp_path / "registers.json"
    table.write_text(RESULTS.read_text())
    monkeypatch.setattr(aot, "measure", lambda variant, architecture: usage_of(variant.name, architecture))
    monkeypatch.setattr(aot, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(sys, "argv", ["aot", "--out", str(tmp_path), "--formats", "k8v4"])
    aot.main()
    found, before = (json.loads(file.read_text())["usages"] for file in (table, RESULTS))
    assert [(u["variant"], u["architecture"]) for u in found] == [(u["variant"], u["architecture"]) for u in before]
    changed = {new["variant"] for new, old in zip(found, before, strict=True) if new != old}
    assert changed == {v.name for v in aot.variants() if v.format == "k8v4"}

    table.write_text(json.dumps({"triton": "0.1", "usages": []}))
    with pytest.raises(ConfigError, match=r"was made with Triton 0\.1: compile all formats anew"):
        aot.main()


def usage_of(name: str, architecture: int) -> aot.Usage:
    """That of the committed table, with a register more."""
    usages = json.loads(RESULTS.read_text())["usages"]
    [found] = [u for u in usages if (u["variant"], u["architecture"]) == (name, architecture)]
    return aot.Usage(**{**found, "registers": found["registers"] + 1})


def test_the_committed_table() -> None:
    check(json.loads(RESULTS.read_text())["usages"], list(aot.variants()))


def test_the_readable_tables_are_the_same() -> None:
    record = json.loads(RESULTS.read_text())
    usages = [aot.Usage(**usage) for usage in record["usages"]]
    roofline = aot.roofline(usages)
    assert RESULTS.with_name("roofline.md").read_text() == roofline
    performance = PERFORMANCE.read_text()
    assert roofline in performance
    quoted = [line for line in performance.splitlines() if re.match(r"\| (decode|transposed)-", line)]
    assert quoted and set(quoted) <= set(aot.table(usages).splitlines())
    assert RESULTS.with_suffix(".md").read_text() == f"Triton {record['triton']}\n\n{aot.table(usages)}"


def run_python(*arguments: str) -> str:
    """What a process prints that compiles: this one has the interpreter switched on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def test_compile_now(tmp_path: Path) -> None:
    quick = os.environ.get("FRAQTL_AOT") != "all"
    run_python("-m", "fraqtl_kernels.gpu.aot", "--out", str(tmp_path), *(["--quick"] if quick else []))
    check(json.loads((tmp_path / "registers.json").read_text())["usages"], list(aot.variants(quick)))


COMPILE_WITH_STAGES = """
import sys
from fraqtl_kernels.gpu import aot
from fraqtl_kernels.gpu.tuning import Tuning
variant = aot.Variant("decode", "k4v4", "bf16", 128, tuning=Tuning(128, 4, int(sys.argv[1]), 255))
print(aot.compile_variant(variant, 90)[0].asm["ttgir"])
print(aot.measure(variant, 90).buffers)
"""


@pytest.mark.parametrize(("stages", "buffers"), [(4, 1), (5, 2), (7, 3)])
def test_a_tile_is_loaded_while_another_is_worked_on(stages: int, buffers: int) -> None:
    """Triton's own intermediate code says the same as the machine code: the loop waits with copies still in flight."""
    code, counted = run_python("-c", COMPILE_WITH_STAGES, str(stages)).rsplit("\n", 2)[:2]
    start = code.index("scf.for", code.index("ttg.async_commit_group"))  # the loop behind the first copies
    waits = [int(n) for n in re.findall(r"ttg.async_wait .*num = (\d+)", code[start : code.index("scf.yield", start)])]
    assert len(waits) == 1 and int(counted) == buffers
    assert (waits[0] > 0) == (buffers > 1)


COUNT_SPECIALIZATIONS = """
import torch
from fraqtl_kernels.formats import FORMATS
from fraqtl_kernels.gpu import aot
from fraqtl_kernels.gpu.operands import LayerOperands
from fraqtl_kernels.gpu.prefill import prefill
from fraqtl_kernels.gpu.gather import dequantize
from fraqtl_kernels.pages import PageLayout
layout = PageLayout(FORMATS["k4v4"], 64, 16)
operands = LayerOperands.of(layout.format, 64, torch.float16, "cpu")
pool = torch.zeros(4, 2, 16, layout.format.bytes_per_token(64), dtype=torch.uint8)
key, value = torch.zeros(2, 64, 2, 64, dtype=torch.float16)
with aot.compiled_only(90) as launched:
    for rows in range(3):
        for columns in (1, 16, 17):
            table = torch.zeros(4, columns, dtype=torch.int32)[rows:]
            dequantize(pool, layout, table, table[0], table[0], 20, key, value, operands)
    for rows in range(3):
        integers = torch.zeros(5, 16, dtype=torch.int32)
        batch = integers[rows:], integers.view(-1)[rows:], integers.view(-1)[rows : rows + 2]
        prefill(key, pool, layout, *batch, 1, key, operands, scale=1.0)
print(*(len({compiled.hash for compiled, _ in found}) for found in launched.values()))
"""


def test_slices_of_a_batch_need_no_compiling_of_their_own() -> None:
    assert run_python("-c", COUNT_SPECIALIZATIONS).split() == ["1", "1"]


@pytest.mark.parametrize("quick", [False, True])
def test_variants_have_names_of_their_own(quick: bool) -> None:
    names = [v.name for v in aot.variants(quick)]
    assert len(set(names)) == len(names) >= 4
