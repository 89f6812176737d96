"""What speculative decoding does to the text, and how many drafts are accepted, by KV format.

    python bench/examples/speculation.py MODEL --text wikitext2-test.txt --out speculation.json

For each arm, a model dtype and a KV format, on vLLM's engine with greedy decoding: the model is asked to copy passages
of a text, plainly, plainly in other groups of tokens, and with drafts: from n-grams, or from --draft-model. The pool
is small, prompts come in chunks, and share their beginning: there are preemptions and prefix hits. Linear layers
round by how many tokens they are given, so what other groups change is what drafts may change, too.

- `acceptance_length`: tokens a request and step with drafts, 1 + accepted / drafts
- `differing`: texts that are not the same token by token as the first ones
- `largest_gap`: between the two best tokens where such a text parts, in nats
- `log_probabilities`: differences of the tokens before that, in nats: their median and 99th percentile
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")

DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
ARMS = [("float32", "bf16"), ("float32", "k4v4"), ("bfloat16", "bf16"), ("bfloat16", "k4v4")]
RUNS = {
    "plain": {"max_num_batched_tokens": 256, "max_num_seqs": 16},
    "grouped": {"max_num_batched_tokens": 200, "max_num_seqs": 7},
    "drafts": {"max_num_batched_tokens": 256, "max_num_seqs": 16},
}
PASSAGE, TOKENS = 30, 24  # words, new tokens
TASK = "Copy the following passage word by word, and write nothing else.\n\n"


def drafts_of(args: argparse.Namespace) -> dict[str, Any]:
    if args.draft_model is None:
        return DRAFTS
    return {"method": args.method, "model": args.draft_model, "num_speculative_tokens": 4}


def prompts(text: Path, count: int) -> list[str]:
    words = text.read_text(encoding="utf-8").split()
    starts = range(0, count * PASSAGE, PASSAGE)
    if len(words) < starts[-1] + PASSAGE:
        raise SystemExit(f"{text} has {len(words)} words: {count} passages need {count * PASSAGE}")
    return [TASK + " ".join(words[start : start + PASSAGE]) for start in starts]


def measure(args: argparse.Namespace, dtype: str, kv_format: str, how: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        dtype=dtype,
        max_model_len=512,
        kv_cache_memory_bytes=args.pool_bytes * (1 if kv_format == "k4v4" else 4),
        attention_backend="FRAQTL",
        additional_config={"fraqtl": {"kv_format": kv_format}},
        disable_log_stats=False,
        speculative_config=drafts_of(args) if how == "drafts" else None,
        **RUNS[how],
    )
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts(args.text, args.prompts)]
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2)
    answers = llm.chat(asked, greedy, use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "gaps": [[_gap(found) for found in answer.outputs[0].logprobs] for answer in answers],
        "logprobs": [_chosen(answer.outputs[0]) for answer in answers],
        "cached_tokens": sum(answer.num_cached_tokens or 0 for answer in answers),
        "preemptions": counters["vllm:num_preemptions"],
        "drafts": counters.get("vllm:spec_decode_num_drafts", 0),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
    }


def _gap(found: dict[int, Any]) -> float:
    """Between the two best tokens, in nats."""
    best = sorted((token.logprob for token in found.values()), reverse=True)
    return float(best[0] - best[1])


def _chosen(output: Any) -> list[float]:
    return [float(found[token].logprob) for token, found in zip(output.token_ids, output.logprobs, strict=True)]


def arm(args: argparse.Namespace, dtype: str, kv_format: str) -> dict[str, Any]:
    """All runs, each in a process of its own."""
    runs = {}
    for how in RUNS:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", dtype, kv_format, how]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs[how] = json.loads(done.stdout.splitlines()[-1])
    drafts = runs["drafts"]
    return {
        "dtype": dtype,
        "kv_format": kv_format,
        "of": len(drafts["tokens"]),
        "acceptance_length": 1 + drafts["accepted"] / drafts["drafts"],
        "drafts": drafts["drafts"],
        "accepted_tokens": drafts["accepted"],
        "preemptions": {how: run["preemptions"] for how, run in runs.items()},
        "cached_tokens": {how: run["cached_tokens"] for how, run in runs.items()},
        "against_plain": {how: compare(runs["plain"], runs[how]) for how in ("grouped", "drafts")},
    }


def compare(plain: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    gaps, moved = [], []
    for row, (a, b) in enumerate(zip(plain["tokens"], other["tokens"], strict=True)):
        parts = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        if parts < len(a):
            gaps.append(plain["gaps"][row][parts])
        pairs = zip(plain["logprobs"][row][:parts], other["logprobs"][row][:parts], strict=True)
        moved += [abs(x - y) for x, y in pairs]
    moved.sort()
    places = {"median": 0.5, "p99": 0.99}
    return {
        "differing": len(gaps),
        "largest_gap": round(max(gaps, default=0.0), 4),
        "log_probabilities": {name: moved[int(len(moved) * share)] for name, share in places.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--draft-model", metavar="MODEL", help="drafts in the place of n-grams")
    parser.add_argument(
        "--method", choices=["draft_model", "eagle", "eagle3"], default="draft_model", help="of --draft-model"
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"], help="of the model"
    )
    parser.add_argument("--pool-bytes", type=int, default=6 << 20, help="of k4v4; unpacked formats get four times that")
    parser.add_argument("--arm", nargs=3, metavar=("DTYPE", "FORMAT", "RUN"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("speculation.json"))
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args, *args.arm)))
        return
    from fraqtl_bench import results

    arms = []
    for dtype, kv_format in (arm for arm in ARMS if arm[0] in args.dtypes):
        arms.append(arm(args, dtype, kv_format))
        print(json.dumps(arms[-1]), flush=True)
        command = " ".join(["python bench/examples/speculation.py", *sys.argv[1:]])
        results.save(args.out, {"command": command, "drafts": drafts_of(args), "new_tokens": TOKENS, "arms": arms})


if __name__ == "__main__":
    main()
