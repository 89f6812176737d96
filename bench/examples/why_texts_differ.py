"""How much of what differs between two runs of the same prompts is the cache, and how much the linear layers.

    python bench/examples/why_texts_differ.py MODEL --out why_texts_differ.json

For every pair of a model dtype and a KV format, on vLLM's engine with greedy decoding and random prompts:

- `chunks`: the log-probabilities of a prompt of 3,000 tokens, computed in chunks of 256 and of 8,192 tokens
- `parallel`: texts of 16 requests at once against the same requests one after another, and those once more
- `reset`: texts after the prefix cache was dropped and running requests with it, with and without a stop string

In float32 linear layers hardly round, so what differs there is the cache. `bf16` keeps 16-bit keys and values.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")

ARMS = [(dtype, kv_format) for dtype in ("bfloat16", "float32") for kv_format in ("bf16", "k4v4")]
TOKENS = range(300, 1000)  # ids that every model has
CHUNKS = (256, 8192)
TEXTS, TEXT_TOKENS = 8, 60


def engine(model: str, dtype: str, kv_format: str, chunk: int) -> Any:
    from vllm import LLM

    return LLM(
        model,
        dtype=dtype,
        max_model_len=3072,
        max_num_batched_tokens=chunk,
        max_num_seqs=16,
        kv_cache_memory_bytes=600 << 20,
        attention_backend="FRAQTL",
        enable_prefix_caching=False,
        additional_config={"fraqtl": {"kv_format": kv_format}},
    )


def prompt(seed: int, length: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": random.Random(seed).choices(TOKENS, k=length)}


def log_probabilities(llm: Any) -> list[float]:
    """Of every token of a prompt but the first."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    [answer] = llm.generate([prompt(0, 3000)], asked, use_tqdm=False)
    return [next(iter(found.values())).logprob for found in answer.prompt_logprobs[1:]]


def texts(llm: Any, prompts: list[Any]) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TEXT_TOKENS, temperature=0, ignore_eos=True)
    return [tuple(x.outputs[0].token_ids) for x in llm.generate(prompts, greedy, use_tqdm=False)]


def text_with_resets(llm: Any, asked: Any, name: str, stop: list[str] | None, every: int) -> tuple[int, ...]:
    """every: how many steps after which the cache and the running request are dropped once; 0: never."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TEXT_TOKENS, temperature=0, ignore_eos=True, stop=stop)
    llm.llm_engine.add_request(name, asked, greedy)
    steps, last = 0, None
    while llm.llm_engine.has_unfinished_requests():
        last = next(iter(llm.llm_engine.step()), last)
        steps += 1
        if every and steps == every:
            llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    assert last is not None
    return tuple(last.outputs[0].token_ids)


def differing(first: list[Any], second: list[Any]) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def measure(model: str, dtype: str, kv_format: str, chunk: int) -> dict[str, Any]:
    llm = engine(model, dtype, kv_format, chunk)
    found: dict[str, Any] = {"log_probabilities": log_probabilities(llm)}
    if chunk == CHUNKS[0]:
        return found
    prompts = [prompt(seed, 20) for seed in range(1, TEXTS + 1)]
    together, alone = texts(llm, prompts * 2), [texts(llm, [x])[0] for x in prompts]
    again = [texts(llm, [x])[0] for x in prompts]
    found["parallel"] = {
        "together_against_alone": differing(together[:TEXTS], alone),
        "twins_together": differing(together[:TEXTS], together[TEXTS:]),
        "alone_again": differing(alone, again),
        "of": TEXTS,
    }
    found["reset"] = {"of": TEXTS}
    for stop in (None, ["\x00"]):
        for every in (0, 20):
            label = f"{'with' if stop else 'without'}_stop_{'reset' if every else 'undisturbed'}"
            resumed = [text_with_resets(llm, x, f"{label}-{i}", stop, every) for i, x in enumerate(prompts)]
            found["reset"][label] = differing(alone, resumed)
    return found


def arm(model: str, dtype: str, kv_format: str) -> dict[str, Any]:
    """Each chunk size in a process of its own."""
    runs = []
    for chunk in CHUNKS:
        command = [sys.executable, __file__, model, "--arm", dtype, kv_format, str(chunk)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    small, large = runs
    gaps = [abs(a - b) for a, b in zip(small["log_probabilities"], large.pop("log_probabilities"), strict=True)]
    return {
        "dtype": dtype,
        "kv_format": kv_format,
        "chunks": {"mean": statistics.mean(gaps), "max": max(gaps)},
        **large,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arm", nargs=3, metavar=("DTYPE", "FORMAT", "CHUNK"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("why_texts_differ.json"))
    args = parser.parse_args()
    if args.arm:
        dtype, kv_format, chunk = args.arm
        print(json.dumps(measure(args.model, dtype, kv_format, int(chunk))))
        return
    from fraqtl_bench import results

    arms = []
    for dtype, kv_format in ARMS:
        arms.append(arm(args.model, dtype, kv_format))
        print(json.dumps(arms[-1]), flush=True)
        results.save(
            args.out, {"command": " ".join(["python bench/examples/why_texts_differ.py", *sys.argv[1:]]), "arms": arms}
        )


if __name__ == "__main__":
    main()
