"""`fraqtl-bench kernels`: small real runs, what counts as an error, and arms that can't run."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fraqtl_bench import dummy_model, kernels, results
from fraqtl_bench.cli import main
from fraqtl_bench.kernels import DEFAULT_GRID, packed, sweep
from fraqtl_bench.kernels.arms import Arm, Prepared, UnavailableError, errors_of
from fraqtl_bench.kernels.cuda_arms import PackedOnGpu
from fraqtl_bench.kernels.registry import arms_for, choose
from fraqtl_bench.kernels.shapes import Inputs, Shape, exact_attention, relative_error
from fraqtl_bench.kernels.timing import CpuTimer, Flush
from fraqtl_kernels.formats import FORMATS, KVFormat, VectorFormat
from fraqtl_kernels.pages import PageLayout
from tests.kernels.gpu.conftest import DEVICE, one_thread  # noqa: F401

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = Shape(2, 40, 4, 2, 64)


def test_shapes() -> None:
    assert Shape.parse("8x4096x32x8x128") == Shape(8, 4096, 32, 8, 128)
    for wrong in ("8x4096", "a", "1x2x3x4x5x6"):
        with pytest.raises(argparse.ArgumentTypeError, match="give batch x context"):
            Shape.parse(wrong)
    for grid in DEFAULT_GRID.values():
        for text in grid:
            Shape.parse(text).check()


def test_inputs_are_fresh_and_repeatable() -> None:
    one, again, other = (Inputs.random(TINY, 16, seed, CPU) for seed in (0, 0, 1))
    assert torch.equal(one.key, again.key) and not torch.equal(one.key, other.key)
    slots = torch.cat([one.slots(0), one.slots(1)])
    assert len(set(slots.tolist())) == 80 and int(slots.max()) < one.blocks * 16


def test_exact_attention() -> None:
    inputs = Inputs.random(TINY, 16, 0, CPU)
    query, key, value = (x.double() for x in (inputs.query[1], inputs.key[1], inputs.value[1]))
    found = exact_attention(inputs.query[1], inputs.key[1], inputs.value[1], inputs.scale)
    for head in range(4):
        weights = (key[:, head // 2] @ query[head] * 64**-0.5).softmax(0)
        assert relative_error(found[head], weights @ value[:, head // 2]) < 1e-12


def test_errors_tell_arithmetic_from_quantization() -> None:
    inputs = Inputs.random(TINY, 16, 0, CPU)
    arms = arms_for("cpu")
    found = {name: errors_of(arms[name].prepare(inputs), inputs) for name in ("sdpa-bf16", "bf16", "k8v8", "k4v4")}
    for errors in found.values():
        assert errors["kernel_error"] < 1e-2
    assert found["bf16"]["quantisation_error"] == found["sdpa-bf16"]["quantisation_error"] == 0
    assert 0 < found["k8v8"]["quantisation_error"] < found["k4v4"]["quantisation_error"] < 0.3
    assert found["k4v4"]["total_error"] == pytest.approx(found["k4v4"]["quantisation_error"], rel=0.1)
    wrong = arms["bf16"].prepare(inputs)
    call = wrong.call
    wrong.call = lambda: (call(), wrong.output.mul_(1.1))
    assert errors_of(wrong, inputs)["kernel_error"] == pytest.approx(0.1, rel=0.1)


@pytest.mark.skipif(DEVICE != "cpu", reason="in Triton's interpreter")
@pytest.mark.parametrize("name", ["k4v4", "bf16"])
def test_gpu_arms_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    inputs = Inputs.random(TINY, 16, 0, CPU)
    prepared = PackedOnGpu(FORMATS[name]).prepare(inputs)
    assert errors_of(prepared, inputs)["kernel_error"] < 1e-2
    assert prepared.bytes == 2 * 40 * 2 * {"k4v4": 68, "bf16": 256}[name]


def test_formats_without_gpu_kernels() -> None:
    pytest.importorskip("triton")
    format = KVFormat("k2v2", VectorFormat(2), VectorFormat(2), "keys that no kernel reads")
    with pytest.raises(UnavailableError, match="no GPU kernels yet"):
        PackedOnGpu(format).prepare(Inputs.random(TINY, 16, 0, CPU))


def test_constants_are_calibrated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    calls, calibrate = [], packed.calibrate
    monkeypatch.setattr(packed, "calibrate", lambda *args: calls.append(args[0].name) or calibrate(*args))
    packed.sample_constants.cache_clear()
    arm = PackedOnGpu(FORMATS["k4v4"])
    constants = [arm.constants(shape) for shape in (TINY, replace(TINY, context=99, batch=1))]
    assert calls == ["k4v4"] and constants[0] is constants[1]
    arm.constants(replace(TINY, head_size=128))
    assert len(calls) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_stored_values_stay_on_the_device(name: str) -> None:
    """The meta device takes no tensor of another one, as little as a GPU does."""
    inputs = Inputs.random(TINY, 16, 0, CPU)
    layout = PageLayout(FORMATS[name], 64, 16)
    constants = packed.sample_constants(layout.format, 64, 2, 4)
    pool = torch.zeros(inputs.blocks, 2, 16, layout.format.bytes_per_token(64), dtype=torch.uint8, device="meta")
    there = replace(inputs, order=inputs.order.to("meta"))
    for stored in packed.stored_values(pool, layout, there, constants):
        assert stored.device.type == "meta" and stored.shape == (40, 2, 64)


def test_gpu_arms_need_no_numba() -> None:
    """It takes a second to import, and the GPU host may lack it."""
    pytest.importorskip("triton")
    code = (
        "import sys; sys.modules['numba'] = None\nfrom fraqtl_bench.kernels.registry import arms_for; arms_for('cuda')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cache_is_flushed_by_reading() -> None:
    flush = Flush("cpu", 1 << 10)
    flush.buffer += 1
    before = flush.buffer._version
    flush()
    assert flush.total == 256  # numbers of 4 bytes: all were read
    assert flush.buffer._version == before


class Broken:
    """An arm that fails in one way or another."""

    def __init__(self, name: str, error: Exception | None = None, late: bool = False, foreign: bool = True) -> None:
        self.name, self.error, self.late, self.foreign = name, error, late, foreign

    def prepare(self, inputs: Inputs) -> Prepared:
        if self.error and not self.late:
            raise self.error

        def call() -> None:
            if self.error:
                raise self.error

        return Prepared(call, inputs.query.clone(), 10, None)


def run(arms: list[Arm]) -> dict[str, Any]:
    args = argparse.Namespace(device="cpu", block_size=16, seed=0, max_sets=2, working_set=1, write=False)
    return sweep.measure([TINY], arms, CpuTimer(), 1e9, 3, args)[str(TINY)]


def test_arms_that_cannot_run_say_why_and_stop_nobody() -> None:
    found = run(
        [
            Broken("absent", UnavailableError("no such package")),
            Broken("raises", RuntimeError("two\nlines")),
            Broken("late", ValueError("in the call"), late=True),
            Broken("fine"),
            arms_for("cpu")["k4v4"],
        ]
    )
    assert found["absent"] == {"skipped": "no such package"}
    assert found["raises"] == {"skipped": "RuntimeError: two"}
    assert found["late"] == {"skipped": "ValueError: in the call"}
    assert found["fine"]["median_ms"] > 0 and found["fine"]["kernel_error"] is None
    assert found["k4v4"]["input_sets"] == 2 and "speed_against_baseline" not in found["k4v4"]


def test_our_own_errors_are_not_swallowed() -> None:
    with pytest.raises(RuntimeError, match="ours"):
        run([Broken("ours", RuntimeError("ours"), foreign=False)])


def test_shapes_that_were_measured_survive_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyShort(Broken):
        def prepare(self, inputs: Inputs) -> Prepared:
            if inputs.shape.context > 40:
                raise RuntimeError("too long")
            return super().prepare(inputs)

    monkeypatch.setattr(kernels, "choose", lambda *_: [OnlyShort("ours", foreign=False)])
    for what in ([], ["--errors"]):
        out = tmp_path / "kernels.json"
        with pytest.raises(RuntimeError, match="too long"):
            main(["kernels", *what, "--grid", "1x40x4x2x64", "1x50x4x2x64", "--repeats", "1", "--out", str(out)])
        assert list(json.loads(out.read_text())["errors" if what else "kernels"]) == ["1x40x4x2x64"]


def test_speed_is_against_the_fastest_baseline() -> None:
    found = {
        "fa3-bf16": {"median_ms": 2.0},
        "flashinfer-bf16": {"median_ms": 1.0},
        "k4v4": {"median_ms": 0.5},
        "gone": {"skipped": "x"},
    }
    sweep._compare(found, sweep.BF16_BASELINES)
    assert found["k4v4"] == {"median_ms": 0.5, "baseline": "flashinfer-bf16", "speed_against_baseline": 2.0}
    assert found["fa3-bf16"]["speed_against_baseline"] == 0.5
    assert found["gone"] == {"skipped": "x"}


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "kernels.json"
    arguments = ["--grid", "1x64x4x2x64", "--repeats", "2", "--working-set", "1", "--max-sets", "2", "--out", str(out)]
    main(["kernels", *arguments])
    found = json.loads(out.read_text())
    assert found["schema_version"] == results.SCHEMA_VERSION
    assert found["machine"]["cores"] >= 1 and found["packages"]["torch"]
    assert found["repeats"] == 2 and found["copy_bytes_per_s"] > 1e8
    arms = found["kernels"]["1x64x4x2x64"]
    assert list(arms) == ["sdpa-bf16", *FORMATS]
    for name, arm in arms.items():
        width = 256 if name == "sdpa-bf16" else FORMATS[name].bytes_per_token(64)
        assert arm["bytes"] == 64 * 2 * width
        assert arm["gb_per_s"] == pytest.approx(arm["bytes"] / arm["median_ms"] / 1e6)
        assert arm["share_of_copy_bandwidth"] == pytest.approx(arm["gb_per_s"] * 1e9 / found["copy_bytes_per_s"])
        assert arm["kernel_error"] < 1e-2 and arm["baseline"] == "sdpa-bf16"
    assert "sdpa-bf16" in capsys.readouterr().out


def test_a_run_times_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "writes.json"
    main(["kernels", "--write", "--grid", "2x64x4x2x64", "--repeats", "2", "--max-sets", "2", "--out", str(out)])
    found = json.loads(out.read_text())["writes"]["2x64x4x2x64"]
    assert list(found) == list(FORMATS)
    for name, arm in found.items():
        assert arm["bytes"] == 2 * 64 * 2 * (256 + FORMATS[name].bytes_per_token(64))
        assert arm["ns_per_vector"] == pytest.approx(arm["median_ms"] * 1e6 / (2 * 2 * 64 * 2))
        assert arm["baseline"] == "bf16" and arm["kernel_error"] < 1e-2
    assert "ns a vector" in capsys.readouterr().out
    main(
        [
            "kernels",
            "--write",
            "--grid",
            "1x64x4x2x64",
            "--repeats",
            "1",
            "--max-sets",
            "1",
            "--arms",
            "sdpa-bf16",
            "fp16",
        ]
    )
    assert "sdpa-bf16 was skipped: its write can't be called by itself" in capsys.readouterr().out


@pytest.mark.parametrize("arm", [PackedOnGpu(FORMATS["k4v4"]), arms_for("cpu")["k4v4"]], ids=["gpu", "cpu"])
@pytest.mark.skipif(DEVICE != "cpu", reason="in Triton's interpreter")
def test_a_timed_write_stores_everything(arm: Arm) -> None:
    inputs = Inputs.random(TINY, 16, 0, CPU)
    prepared = arm.prepare(inputs)
    prepared.call()
    before = prepared.output.clone()
    inputs.key.zero_()
    inputs.value.fill_(3.0)
    prepared.writing(inputs).call()
    prepared.call()
    assert not torch.equal(before, prepared.output)
    assert prepared.stored is not None
    _, stored = prepared.stored()  # of the first request; means, as the basis was made for other values
    assert (stored.mean(-1) - 3).abs().max() < 1  # in every token: what was there before has a mean of 0
    assert (prepared.output.float().mean(-1) - 3).abs().max() < 1


def test_errors_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "errors.json"
    main(["kernels", "--errors", "--grid", "1x64x4x2x64", "--arms", "k4v4", "bf16", "--out", str(out)])
    found = json.loads(out.read_text())["errors"]["1x64x4x2x64"]
    assert set(found) == {"k4v4", "bf16"} and set(found["k4v4"]) == {
        "kernel_error",
        "quantisation_error",
        "total_error",
    }
    assert "relative error against float64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--grid", "1x64x5x2x64"], "1x64x5x2x64: the query heads must be a multiple of the KV heads"),
        (["--arms", "int3"], "unknown arm for --device cpu 'int3': choose one of sdpa-bf16, bf16, "),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["kernels", *arguments])
    assert ended.value.code == 2
    assert f"fraqtl-bench: {sentence}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["kernels", "--device", "cuda"])
    assert "--device cuda: torch finds no GPU here, choose cpu" in capsys.readouterr().err


def test_every_gpu_arm_can_be_named() -> None:
    names = [arm.name for arm in choose("cuda", None)]
    assert names[:2] == ["fa3-bf16", "flashinfer-bf16"] and names[-len(FORMATS) :] == list(FORMATS)
    assert [arm.name for arm in choose("cuda", ["k4v4", "fa3-bf16"])] == ["fa3-bf16", "k4v4"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they can run")
def test_rivals_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    inputs = Inputs.random(TINY, 16, 0, CPU)
    for name in ("fa3-bf16", "flashinfer-bf16", "fa3-fp8"):
        with pytest.raises(UnavailableError, match="can't be imported"):
            arms_for("cuda")[name].prepare(inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="in Triton's interpreter")
def test_what_the_memory_checker_runs() -> None:
    pytest.importorskip("triton")
    from fraqtl_bench.kernels import sanitize

    output = sanitize.run(FORMATS["k4v4"], 64, CPU, num_sms=4, lengths=(1, 17, 40, 70))
    assert output.isfinite().all() and output.abs().max() > 0


RIVALS_IN_THE_INTERPRETER = """
import os, sys
os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # vLLM believes in a GPU that comes later
import torch
torch.set_num_threads(1)
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.bfloat16 = torch.float16  # whose bytes the interpreter doesn't multiply as what they are
import fraqtl_vllm.platform.packed_cpu
fraqtl_vllm.platform.packed_cpu.check_supported = lambda config: None  # it refuses rivals' formats
from fraqtl_bench.kernels._vllm import prepare_backend
from fraqtl_bench.kernels.arms import errors_of
from fraqtl_bench.kernels.shapes import Inputs, Shape
inputs = Inputs.random(Shape(2, 70, 4, 2, 64), 16, 0, torch.device("cpu"))
for dtype in ("auto", "int4_per_token_head", "turboquant_4bit_nc"):
    prepared = prepare_backend("TURBOQUANT" if dtype.startswith("turbo") else "TRITON_ATTN", dtype, inputs)
    print("FOUND", dtype, prepared.bytes, errors_of(prepared, inputs))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run as they are")
def test_vllm_backends_in_the_interpreter() -> None:
    """That vLLM's builder, write and forward are called as they want to be, which a GPU run would find out late."""
    pytest.importorskip("triton")
    pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, "-c", RIVALS_IN_THE_INTERPRETER], capture_output=True, text=True)
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found = {dtype: (int(size), ast.literal_eval(errors)) for _, dtype, size, errors in lines}
    assert set(found) == {"auto", "int4_per_token_head", "turboquant_4bit_nc"}, done.stderr[-2000:]
    per_token = {dtype: size / (2 * 70 * 2) for dtype, (size, _) in found.items()}
    assert per_token == {"auto": 256, "int4_per_token_head": 72, "turboquant_4bit_nc": 70}
    assert found["auto"][1]["kernel_error"] < 2e-3
    assert found["int4_per_token_head"][1]["kernel_error"] < 1e-2  # against what it stored, by our reading of it
    assert all(errors["total_error"] < 0.2 for _, errors in found.values())


def test_the_dummy_model_is_a_llama_of_eight_billion(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoTokenizer

    dummy_model.make(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (32, 4096, 128)
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path))
