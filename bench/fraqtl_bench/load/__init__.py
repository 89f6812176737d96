"""`fraqtl-bench load`: what the packed cache does to throughput and latency, at equal memory.

One server per arm is started in turn (A B A B ...), with the same model, flags and KV memory, loaded by
`vllm bench serve` at every point of the ladders, and stopped. With --url, servers that run already are loaded instead.
Arms are the formats of fraqtl-serve, and stock vLLM as vllm:auto, vllm:fp8, vllm:int4_per_token_head,
vllm:turboquant_4bit_nc and vllm:nvfp4. What can't run becomes a row with its reason. Ctrl-C leaves a partial report and
no server behind; --resume goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fraqtl_bench.load.options import DATASETS, pair, size


def run(args: argparse.Namespace) -> None:
    from fraqtl_bench.load.command import run as run_load

    run_load(args)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("load", help="throughput and latency against another cache", description=__doc__)
    parser.add_argument("--arms", nargs="+", default=["bf16", "k4v4"], metavar="ARM", help="the first is 1x")
    parser.add_argument(
        "--url", action="append", type=pair, default=[], metavar="NAME=URL", help="a running server, instead of --arms"
    )
    parser.add_argument("--model", help="to serve (default: the demo model)")
    parser.add_argument("--tokenizer", help="for the prompts (default: what the server names as its model)")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--kv-memory", type=size, metavar="SIZE", help="of every server's pool, such as 256MiB")
    memory.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="or what vLLM may take of a GPU")
    _add_load(parser)
    parser.add_argument("--repeats", type=int, default=2, help="turns of every arm (default: %(default)s)")
    parser.add_argument(
        "--slo", nargs="+", default=[], metavar="NAME:MS", help="ttft, tpot and e2el at most, for goodput"
    )
    parser.add_argument("--out", type=Path, default=Path("load"), help="folder of the report (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
    parser.add_argument("--no-figures", action="store_true", help="leave the PNG file out (it needs matplotlib)")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest goes to every server")
    parser.set_defaults(run=run)


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=DATASETS, default="random", help="prompts (default: unique random ones)")
    parser.add_argument("--dataset-path", type=Path, metavar="FILE", help="of custom: JSON lines with a `prompt` each")
    parser.add_argument("--input", type=int, default=1024, metavar="TOKENS", help="of a prompt (default: %(default)s)")
    parser.add_argument("--output", type=int, default=128, metavar="TOKENS", help="of an answer (default: %(default)s)")
    parser.add_argument("--prefix-len", type=int, default=256, metavar="TOKENS", help="of prefix_repetition")
    parser.add_argument("--prefixes", type=int, default=4, help="of prefix_repetition (default: %(default)s)")
    parser.add_argument("--concurrency", nargs="*", type=int, default=[1, 4, 16], help="a point each")
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="requests a second, a point each")
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[], metavar="TOKENS", help="prompt lengths for ITL against context"
    )
    parser.add_argument("--context-concurrency", type=int, default=1, help="of these (default: %(default)s)")
    parser.add_argument(
        "--requests-each", type=int, default=4, metavar="N", help="requests at concurrency C: C x N (default: 4)"
    )
    parser.add_argument("--min-requests", type=int, default=8, metavar="N", help="but so many at least (default: 8)")
    parser.add_argument(
        "--rate-requests", type=int, default=64, metavar="N", help="requests at a rate (default: %(default)s)"
    )
    parser.add_argument("--warmup", type=int, default=4, help="requests before every turn (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
