"""Where a decode step on the CPU goes: milliseconds a step in each kind of layer, and outside of the model.

    taskset -c 0 python bench/examples/where_a_step_goes.py MODEL --kv-formats bf16 k4v4 --batch 1 --context 2048

One process per format, vLLM's engine in it, hooks before and after every layer. Random prompts, greedy answers.
On more than one core preload torch's OpenMP library, as vLLM does for its engine: LD_PRELOAD=.../torch/lib/libgomp.so.1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")

TOKENS = range(300, 1000)  # ids that every model has
# vLLM's classes. An attention layer writes the new tokens' keys and values, too.
KINDS = {
    "Attention": "attention and write",
    "QKVParallelLinear": "linear: q, k, v",
    "RowParallelLinear": "linear: out of attention, down",
    "MergedColumnParallelLinear": "linear: gate, up",
    "LogitsProcessor": "linear: logits",
    "RMSNorm": "norms",
    "GemmaRMSNorm": "norms",
    "SiluAndMul": "gates",
    "GeluAndMul": "gates",
    "RotaryEmbedding": "rotary embedding",
}


class Clock:
    """Time by kind of layer. Layers of these kinds don't hold each other."""

    def __init__(self, model: Any) -> None:
        self.seconds: Counter[str] = Counter()
        self._started = 0.0
        for module in model.modules():
            if (kind := KINDS.get(type(module).__name__)) is not None:
                module.register_forward_pre_hook(self._start)
                module.register_forward_hook(lambda *_, kind=kind: self._stop(kind))

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, kind: str) -> None:
        self.seconds[kind] += time.perf_counter() - self._started


def measure(args: argparse.Namespace, kv_format: str) -> dict[str, float]:
    """Milliseconds a step: the whole, each kind, and the rest."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        max_model_len=args.context + args.steps + 16,
        max_num_seqs=args.batch,
        kv_cache_memory_bytes=args.kv_memory << 20,
        attention_backend="FRAQTL",
        additional_config={"fraqtl": {"kv_format": kv_format}},
    )
    engine = llm.llm_engine
    clock = Clock(engine.model_executor.driver_worker.worker.model_runner.get_model())
    rng, greedy = random.Random(0), SamplingParams(max_tokens=args.steps + 8, temperature=0, ignore_eos=True)
    for number in range(args.batch):
        engine.add_request(str(number), {"prompt_token_ids": rng.choices(TOKENS, k=args.context)}, greedy)
    answering: set[str] = set()
    while len(answering) < args.batch:  # prompts, and the first step after them
        answering |= {x.request_id for x in engine.step()}
    engine.step()
    clock.seconds.clear()
    begun = time.perf_counter()
    for _ in range(args.steps):
        engine.step()
    whole = time.perf_counter() - begun
    parts = {kind: seconds / args.steps * 1e3 for kind, seconds in clock.seconds.most_common()}
    return {"step": whole / args.steps * 1e3, **parts, "the rest": whole / args.steps * 1e3 - sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-formats", nargs="+", default=["bf16", "k4v4"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--kv-memory", type=int, default=600, metavar="MIB")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return
    from fraqtl_bench import results

    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.kv_formats}
    for _ in range(args.turns):
        for name in args.kv_formats:
            command = [sys.executable, *sys.argv, "--only", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, {kind: round(value, 2) for kind, value in found[name][-1].items()}, flush=True)
    if args.out:
        made_by = " ".join(["python bench/examples/where_a_step_goes.py", *sys.argv[1:]])
        results.save(
            args.out,
            {"command": made_by, "batch": args.batch, "context": args.context, "steps": args.steps, "ms": found},
        )


if __name__ == "__main__":
    main()
