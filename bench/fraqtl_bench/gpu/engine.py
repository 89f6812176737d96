"""Run 2, `bench/gpu_engine.sh`: vLLM end to end on a GPU, packed and stock. At most 300 s.

Needs all parts of the bundle. `--unpack` only unpacks parts, for a transfer that holds the first of them. `--rehearse`
does the same steps on a CPU with the demo model and short prompts; there our bf16 stands in for stock vLLM, which
has no CPU to run on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fraqtl_bench.gpu import parts, verdict
from fraqtl_bench.gpu.schedule import Outcome, Run, Step, python
from fraqtl_bench.gpu.verdict import Finding

LIMIT = 300
CPU_TEXTS = "bench/results/cpu/texts_unrefined.json"
# Compiling with torch takes longer than the step; decode steps are captured all the same.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
PACKED_KEYS = {"fraqtl": {"prefill_keys": "packed"}}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


@dataclass(frozen=True)
class Plan:
    """What differs between a run and its rehearsal. stock: the format that the packed one is compared with."""

    stock: str
    points: tuple[str, ...]
    latency: tuple[str, ...]
    model: tuple[str, ...]
    texts: tuple[str, ...]
    server: tuple[str, ...]
    demo_server: tuple[str, ...]
    prefix: tuple[str, ...]
    limits: Mapping[str, float]


def plan_for(rehearse: bool, work: Path) -> Plan:
    if rehearse:
        return Plan(
            stock="bf16",
            points=("1x40", "2x40"),
            latency=("--tokens", "4", "--rounds", "1"),
            model=(),
            texts=("--contexts", "256", "--questions", "2", "--compare", CPU_TEXTS),
            server=(),
            demo_server=(),
            prefix=("--context", "100"),
            limits=dict.fromkeys(("imports", "texts", "k4v4", "stock", "prefix", "drafts"), 120),
        )
    graphs = ("--compilation-config", json.dumps(GRAPHS))
    return Plan(
        stock="stock",
        points=("1x2048", "1x16384", "1x32768", "16x2048", "16x8192"),
        latency=("--tokens", "48", "--rounds", "3"),
        model=("--model", str(work / "dummy-8b")),
        texts=("--compare", CPU_TEXTS),
        server=("--load-format", "dummy", "--gpu-memory-utilization", "0.6", *graphs),
        demo_server=("--gpu-memory-utilization", "0.3", *graphs),
        prefix=("--context", "2000"),
        limits={"imports": 45, "texts": 60, "k4v4": 90, "stock": 80, "prefix": 60, "drafts": 60},
    )


def steps(plan: Plan, work: Path) -> list[Step]:
    def step(name: str, *command: str, must_pass: bool = False) -> Step:
        return Step(name, plan.limits[name], command, must_pass)

    def out(name: str) -> tuple[str, str]:
        return "--out", str(work / f"{name}.json")

    def latency(name: str, format: str) -> Step:
        what = ("latency", "--format", format, "--points", *plan.points, *plan.latency, *plan.model, *out(name))
        return step(name, *python("-m", "fraqtl_bench.gpu.serving", *what, "--server-args", *plan.server))

    def texts(name: str, *flags: str) -> Step:
        server = ("--server-args", *plan.demo_server, "--additional-config", json.dumps(PACKED_KEYS), *flags)
        return step(name, *python("-m", "fraqtl_bench.cli", "texts", *plan.texts, *out(name), *server))

    return [
        step("imports", *python("-c", IMPORTS), must_pass=True),
        texts("texts"),
        latency("k4v4", "k4v4"),
        latency("stock", plan.stock),
        step("prefix", *python("-m", "fraqtl_bench.gpu.serving", "prefix", *plan.prefix, *out("prefix"))),
        texts("drafts", "--speculative-config", json.dumps(DRAFTS)),
    ]


IMPORTS = """
import torch, triton, vllm, fraqtl_serve, fraqtl_vllm, fraqtl_bench.cli
import vllm.v1.engine.async_llm, vllm.entrypoints.openai.api_server
from importlib.metadata import entry_points
from vllm.platforms import current_platform
names = [e.name for e in entry_points(group="vllm.general_plugins")]
print(torch.__version__, triton.__version__, vllm.__version__, current_platform.device_name, names)
assert "fraqtl" in names, "the plugin's entry points can't be found"
"""


def findings(plan: Plan, work: Path, outcomes: Sequence[Outcome]) -> list[Finding]:
    return [
        verdict.passed("vLLM and the plugin can be imported", outcomes, "imports"),
        texts(work, outcomes, "texts", "greedy texts are the CPU's, up to rounding"),
        *latencies(plan, work),
        prefix(work / "prefix.json", outcomes),
        texts(work, outcomes, "drafts", "so are they with n-gram drafts"),
    ]


def texts(work: Path, outcomes: Sequence[Outcome], step: str, goal: str) -> Finding:
    finding = verdict.passed(goal, outcomes, step)
    found: dict[str, Any] = verdict.load(work / f"{step}.json") or {}
    if "compared" not in found:
        return Finding(finding.goal, finding.found, verdict.NOT_MEASURED)
    counts = {name: len(x) if isinstance(x, list) else x for name, x in found["compared"].items()}
    text = f"{counts['same']} the same, {counts['differ_by_rounding']} by rounding, {counts['differ']} differ"
    return Finding(finding.goal, text, "missed" if counts["differ"] else "met")


def latencies(plan: Plan, work: Path) -> list[Finding]:
    """No slower than stock at any point: the packed cache must not cost what it saves."""
    packed, stock = ((verdict.load(work / f"{name}.json") or {}).get("itl_ms", {}) for name in ("k4v4", "stock"))
    found = []
    for point in plan.points:
        times = [arm[point]["median"] for arm in (packed, stock) if point in arm]
        ratio = times[1] / times[0] if len(times) == 2 else None
        finding = verdict.check(f"time per token at {point}, {plan.stock} / k4v4", ratio, 1.0, None, "x")
        if ratio is not None:
            text = f"{finding.found} ({times[1]:.2f} / {times[0]:.2f} ms)"
            finding = Finding(finding.goal, text, finding.verdict)
        found.append(finding)
    return found


def prefix(path: Path, outcomes: Sequence[Outcome]) -> Finding:
    finding = verdict.passed("a start with default flags serves a prefix hit", outcomes, "prefix")
    found: dict[str, Any] = verdict.load(path) or {}
    if "hits" not in found:
        return finding
    same = "the same text" if found["same_text"] else "another text"
    text = f"{found['hits'][1]:.0f} tokens found, {same}, start {found['start_seconds']:.0f} s"
    return Finding(finding.goal, text, finding.verdict)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_engine.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for results.tar.gz")
    parser.add_argument("--parts", type=Path, help="folder with parts of the bundle to unpack first")
    parser.add_argument("--site", type=Path, default=parts.SITE, help="where to unpack them (default: %(default)s)")
    parser.add_argument("--unpack", action="store_true", help="unpack the parts and do nothing else")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the whole run (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with the demo model")
    args = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="fraqtl-gpu-engine-"))
    run = Run(work, args.out.resolve(), args.seconds)
    if args.parts:
        parts.prepare(args.parts, args.site)
        parts.compile_python(args.site)
        print(f"{run.elapsed:5.0f} s  Python files compiled", flush=True)
    if args.unpack:
        return
    os.environ |= parts.environment(args.site)
    # Without the second vLLM compiles FlashInfer's sampler when it starts.
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
    plan = plan_for(args.rehearse, work)
    if plan.model:
        from fraqtl_bench.dummy_model import make

        make(Path(plan.model[1]))

    def report(outcomes: Sequence[Outcome]) -> str:
        found = findings(plan, work, outcomes)
        return verdict.as_text("vLLM with packed KV on a GPU", args.rehearse, found, outcomes)

    passed = run.go(steps(plan, work), report)
    print("\n" + report(run.outcomes) + f"\nEverything is in {run.out / 'results.tar.gz'}", flush=True)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
