#!/usr/bin/env python3
"""Our server and llama.cpp on one core each, in turns: how fast both read a prompt and write an answer.

    npm install --ignore-scripts node-llama-cpp@3.22.1      (in a folder with a copy of llama_cpp.mjs)
    taskset -c 0 python bench/examples/beside_llama_cpp.py MODEL MODEL.gguf --node FOLDER/llama_cpp.mjs --out FILE

Every round asks each arm once, with a prompt of random tokens that no cache has seen; the order turns round from one to
the next. Of our servers the time to the first token is the client's, HTTP included. llama.cpp is called as a library.
MODEL has 16-bit weights, MODEL.gguf those that its name says, mostly of 4 bits.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from fraqtl_bench import results
from fraqtl_bench.server import Server, running

FORMATS, CACHE_TYPES = ("bf16", "k4v4"), ("f16", "q4_0")
TOKENS = range(300, 1000)  # ids that every model has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--node", type=Path, required=True, metavar="SCRIPT")
    parser.add_argument("--prompt-tokens", type=int, default=1815)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environment", default="", help="what ran differently, in words")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as servers:
        limit = str(args.prompt_tokens + args.new_tokens + 16)
        ours = {
            name: servers.enter_context(running(args.model, "--kv-format", name, "--max-model-len", limit))
            for name in FORMATS
        }
        for server in ours.values():
            ask(server, 64, 8)
        arms = [*ours, *CACHE_TYPES]
        for turn in range(args.rounds):
            for name in arms if turn % 2 == 0 else reversed(arms):
                server = ours.get(name)
                speeds = ask(server, args.prompt_tokens, args.new_tokens) if server else llama_cpp(name, args)
                for kind, value in speeds.items():
                    found.setdefault(kind, {}).setdefault(name, []).append(value)
                print(name, speeds, flush=True)
    median = {k: {name: statistics.median(v) for name, v in by_arm.items()} for k, by_arm in found.items()}
    ratios = {k: {f"k4v4 / {name}": m["k4v4"] / m[name] for name in m if name != "k4v4"} for k, m in median.items()}
    command = " ".join(["taskset -c 0 python bench/examples/beside_llama_cpp.py", *sys.argv[1:]])
    settings = {"command": command, "environment": args.environment}
    settings |= {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    results.save(args.out, {**settings, "median": median, "ratios": ratios, "rounds": found})
    print(json.dumps(ratios, indent=1))


def ask(server: Server, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Tokens a second of one request to our server, streamed."""
    prompt = random.choices(TOKENS, k=prompt_tokens)
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    times = [time.perf_counter()]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=600) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.perf_counter())
    first, last = times[1], times[-1]
    return {
        "prompt_tokens_per_second": prompt_tokens / (first - times[0]),
        "decode_tokens_per_second": (new_tokens - 1) / (last - first),
    }


def llama_cpp(cache_type: str, args: argparse.Namespace) -> dict[str, float]:
    command = ["node", str(args.node), str(args.gguf), cache_type, str(args.prompt_tokens), str(args.new_tokens), "1"]
    done = subprocess.run([*command, "1"], check=True, capture_output=True, text=True)
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {kind: said[kind][0] for kind in ("prompt_tokens_per_second", "decode_tokens_per_second")}


if __name__ == "__main__":
    main()
