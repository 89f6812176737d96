"""Takes the options of `vllm bench serve` and lets a stand-in server say what it would have found."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import httpx


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--base-url", "--result-dir", "--result-filename"):
        parser.add_argument(name)
    for name in ("--num-prompts", "--max-concurrency", "--seed", "--output-len"):
        parser.add_argument(name, type=int, default=0)
    for name in ("prefix", "suffix"):
        parser.add_argument(f"--prefix-repetition-{name}-len", type=int, default=0)
    args, _ = parser.parse_known_args()
    asked = {
        "requests": args.num_prompts, "concurrency": args.max_concurrency, "seed": args.seed, "output": args.output_len,
        "input": args.prefix_repetition_prefix_len + args.prefix_repetition_suffix_len,
    }  # fmt: skip
    try:
        found = httpx.post(f"{args.base_url}/load", json=asked, timeout=600).json()
    except httpx.HTTPError as error:
        sys.exit(f"aiohttp.ClientError: {error}")
    (Path(args.result_dir) / args.result_filename).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
