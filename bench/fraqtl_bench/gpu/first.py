"""Run 1, `bench/gpu_first.sh`: are the kernels right on this GPU, and how fast are they? At most 260 s.

Needs the project's tree and, for a baseline, FlashAttention 3; nothing of vLLM's engine. `--rehearse` does the
same in Triton's interpreter with tiny shapes, without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from fraqtl_bench.gpu import parts, verdict
from fraqtl_bench.gpu.lines import read_lines
from fraqtl_bench.gpu.schedule import Outcome, Run, Step, python
from fraqtl_bench.gpu.verdict import Finding, SpeedGoal

LIMIT = 260
TESTS = "tests/kernels/gpu"
# That compile for GPUs that aren't there, and that break code which only the interpreter runs
LEFT_OUT = ("test_aot.py", "test_mutations.py")
COPY_SHARE, LONG = 0.75, 256 << 10  # of a copy's speed, from so many cached tokens on
ERROR = 1e-2  # of the kernel, rounding of a bf16 output included


@dataclass(frozen=True)
class Plan:
    """What differs between a run and its rehearsal. goals: of speed, with the shapes that are timed."""

    device: str
    goals: tuple[SpeedGoal, ...]
    tune: tuple[str, ...]
    error_shapes: tuple[str, ...]
    write_shapes: tuple[str, ...]
    tests: tuple[str, ...]
    memcheck: Sequence[str]
    limits: Mapping[str, float]
    environment: dict[str, str]


def goals(**by_shape: tuple[float, float]) -> tuple[SpeedGoal, ...]:
    return tuple(SpeedGoal(shape[1:], *limits) for shape, limits in by_shape.items())


GPU = Plan(
    device="cuda",
    goals=goals(
        _1x32768x32x8x128=(1.8, 2.3),
        _8x32768x32x8x128=(2.9, 3.2),
        _32x8192x32x8x128=(2.9, 3.2),
        _1x131072x32x8x128=(2.85, 3.1),
        _1x8192x32x8x128=(1.1, 1.4),
        _64x2048x32x8x128=(2.6, 3.0),
        _8x4096x32x8x128=(1.8, 2.3),
    ),
    tune=(),
    error_shapes=("1x8192x32x8x128", "1x65536x32x8x128", "1x131072x32x8x128"),
    write_shapes=("1x2048x32x8x128", "1x8192x32x8x128"),
    tests=("-n", "12", TESTS, *(f"--ignore={TESTS}/{name}" for name in LEFT_OUT)),
    memcheck=(
        *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"),
        *python("-m", "fraqtl_bench.kernels.sanitize", "--formats", "k4v4", "--head-sizes", "128"),
    ),
    limits={
        "machine": 20,
        "codes": 25,
        "decode": 25,
        "tests": 80,
        "tune": 85,
        "errors": 20,
        "writes": 15,
        "memcheck": 45,
    },
    environment={"FRAQTL_TEST_DEVICE": "cuda"},
)
REHEARSAL = Plan(
    device="cpu",
    goals=goals(_1x17x2x1x64=(0.01, 1000), _2x17x2x1x64=(1000, 2000)),
    tune=("--variants", "tile=32,warps=1,stages=1", "tile=16,warps=1,stages=1", "--repeats", "1"),
    error_shapes=("1x33x2x1x64",),
    write_shapes=("1x33x2x1x64",),
    tests=(f"{TESTS}/test_tuned.py",),
    memcheck=python(
        *("-m", "fraqtl_bench.kernels.sanitize", "--device", "cpu", "--formats", "k4v4", "--head-sizes", "64"),
        *("--lengths", "1", "2", "17", "20"),
    ),
    limits=dict.fromkeys(GPU.limits, 90) | {"tests": 90},
    environment={"TRITON_INTERPRET": "1", "FRAQTL_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""},
)


def steps(plan: Plan, work: Path) -> list[Step]:
    """In the order of what would be missed most."""
    device = ("--device", plan.device)

    def step(name: str, *command: str, must_pass: bool = False) -> Step:
        return Step(name, plan.limits[name], command, must_pass, plan.environment)

    def module(name: str, *arguments: str) -> list[str]:
        return python("-m", f"fraqtl_bench.{name}", *arguments, *device)

    def pytest(*arguments: str) -> list[str]:
        return python("-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments)

    def out(name: str) -> tuple[str, str]:
        return "--out", str(work / name)

    times = [goal.shape for goal in plan.goals]
    tune = ("--shapes", *times, *plan.tune, "--seconds", str(plan.limits["tune"] - 8))
    arms = ("--arms", "bf16", "k8v8", "k8v4", "k4v4", *(["fa3-bf16"] if plan.device == "cuda" else []))
    return [
        step("machine", *module("gpu.checks", "machine", *out("machine.json"))),
        step("codes", *pytest(f"{TESTS}/test_unpack.py"), must_pass=True),
        step("decode", *module("gpu.checks", "decode", *out("decode.json")), must_pass=True),
        step("tests", *pytest(f"--junit-xml={work / 'tests.xml'}", *plan.tests)),
        step("tune", *module("tune", *tune, *out("tune.jsonl"), "--table", str(work / "tuned.json"))),
        step("errors", *module("kernels", "--errors", "--grid", *plan.error_shapes, *arms, *out("errors.json"))),
        step(
            "writes", *module("kernels", "--write", "--repeats", "5", "--grid", *plan.write_shapes, *out("writes.json"))
        ),
        step("memcheck", *plan.memcheck),
    ]


def findings(plan: Plan, work: Path, outcomes: Sequence[Outcome]) -> list[Finding]:
    """The goals of a first run, by what lies in its folder."""
    return [
        verdict.passed("every code is unpacked right, in every place of a register", outcomes, "codes"),
        verdict.passed("write, decode, compare with float64: bf16, k8v8, k4v4", outcomes, "decode"),
        tests(work / "tests.xml", outcomes),
        *speed_findings(plan, work / "tune.jsonl"),
        *error_findings(plan, work / "errors.json"),
        verdict.passed("no access outside of what was allocated (memcheck)", outcomes, "memcheck"),
    ]


def tests(path: Path, outcomes: Sequence[Outcome]) -> Finding:
    finding = verdict.passed("the kernel tests pass, compiled", outcomes, "tests")
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return finding
    counts = suite.attrib if suite is not None else {}
    broken = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    found = f"{counts.get('tests')} run, {broken} failed, {counts.get('skipped')} skipped"
    return Finding(finding.goal, found, finding.verdict)


def speed_findings(plan: Plan, path: Path) -> list[Finding]:
    speeds = verdict.speeds(read_lines(path)) if path.exists() else {}
    found = []
    for goal in plan.goals:
        entry = speeds.get(goal.shape, {})
        text = f"k4v4 decode at {goal.shape}, against the fastest 16-bit kernel"
        found.append(verdict.check(text, entry.get("speed"), goal.must, goal.stretch, "x"))
        batch, context = goal.shape.split("x")[:2]
        if int(batch) * int(context) >= LONG:
            share = entry.get("variant", {}).get("share_of_copy_bandwidth")
            found.append(verdict.check(f"its share of a copy's speed at {goal.shape}", share, COPY_SHARE))
    return found


def error_findings(plan: Plan, path: Path) -> list[Finding]:
    errors = (verdict.load(path) or {}).get("errors", {})
    found = []
    for shape in plan.error_shapes:
        goal = f"kernel error of k4v4 at {shape}: below {ERROR:g}"
        error = errors.get(shape, {}).get("k4v4", {}).get("kernel_error")
        if error is None:
            found.append(Finding(goal, "-", verdict.NOT_MEASURED))
        else:
            found.append(Finding(goal, f"{error:.1e}", "met" if error < ERROR else "missed"))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_first.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for results.tar.gz")
    parser.add_argument("--parts", type=Path, help="folder with parts of the bundle to unpack first")
    parser.add_argument("--site", type=Path, default=parts.SITE, help="where to unpack them (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the whole run (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, with tiny shapes")
    args = parser.parse_args(argv)
    plan = REHEARSAL if args.rehearse else GPU
    work = Path(tempfile.mkdtemp(prefix="fraqtl-gpu-first-"))
    run = Run(work, args.out.resolve(), args.seconds)
    if args.parts:
        parts.prepare(args.parts, args.site)
    os.environ |= parts.environment(args.site)

    def report(outcomes: Sequence[Outcome]) -> str:
        found = findings(plan, work, outcomes)
        return verdict.as_text("Kernels on a GPU", args.rehearse, found, outcomes)

    passed = run.go(steps(plan, work), report)
    print("\n" + report(run.outcomes) + f"\nEverything is in {run.out / 'results.tar.gz'}", flush=True)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
