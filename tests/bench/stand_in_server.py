"""A server that answers like ours as far as `fraqtl-bench load` asks: `python -m tests.bench.stand_in_server`.

Takes the flags of a server and leaves them unread, but for --kv-format, --port, and its own:
--diary FILE    a line for its start, for every load and for its end
--broken ARM    that arm ends at its start with a sentence
--die ARM:C     that arm ends when it is loaded with concurrency C
--hang ARM      loads of that arm are never answered
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK_BYTES = {"bf16": 4000, "k4v4": 1000}
POOL = 400_000
BLOCK_SIZE = 16
SPEED = {"bf16": 100.0, "k4v4": 150.0}  # tokens a second
FIT = {"bf16": (2.0, 0.002), "k4v4": (3.0, 0.001)}  # ms, ms a token of context


class StandIn(ThreadingHTTPServer):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", args.port), Handler)
        self.args, self.counters = args, Counter[str]()

    @property
    def blocks(self) -> int:
        return POOL // BLOCK_BYTES[self.args.kv_format]

    def write(self, text: str) -> None:
        if self.args.diary:
            with self.args.diary.open("a") as diary:
                diary.write(f"{text}\n")

    def metrics(self) -> str:
        info = f'{{block_size="{BLOCK_SIZE}",cache_dtype="auto",engine="0",kv_cache_max_concurrency="2.5",'
        info += f'kv_cache_size_tokens="{self.blocks * BLOCK_SIZE}",num_gpu_blocks="{self.blocks}"}} 1.0'
        lines = ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{info}"]
        for name, kind in (("vllm:num_requests_running", 3), ("vllm:num_requests_waiting", 1)):
            lines += [f"# TYPE {name} gauge", f'{name}{{engine="0"}} {kind}']
        lines += ["# TYPE vllm:kv_cache_usage_perc gauge", 'vllm:kv_cache_usage_perc{engine="0"} 0.75']
        for name, value in self.counters.items():
            if name.endswith("_total"):
                lines += [f"# TYPE {name.removesuffix('_total')} counter", f'{name}{{engine="0"}} {value}']
        lines.append("# TYPE vllm:request_queue_time_seconds histogram")
        for part in ("count", "sum"):
            name = f"vllm:request_queue_time_seconds_{part}"
            lines.append(f'{name}{{engine="0"}} {self.counters[name]}')
        return "\n".join(lines) + "\n"

    def load(self, asked: dict[str, Any]) -> dict[str, float]:
        """What `vllm bench serve` would have found."""
        arm, requests = self.args.kv_format, asked["requests"]
        self.write(f"load {arm} {asked['concurrency']} input {asked['input']} seed {asked['seed']}")
        if self.args.die == f"{arm}:{asked['concurrency']}":
            os._exit(0)
        if self.args.hang == arm:
            time.sleep(600)
        tokens = asked["input"] + asked["output"]
        blocks = -(-(tokens - 1) // BLOCK_SIZE) * requests
        self.counters.update(
            {
                "vllm:request_success_total": requests,
                "vllm:prompt_tokens_total": requests * asked["input"],
                "vllm:generation_tokens_total": requests * asked["output"],
                "vllm:num_preemptions_total": 3 if arm == "bf16" else 1,
                "vllm:prefix_cache_queries_total": 10 * requests,
                "vllm:prefix_cache_hits_total": requests,
                "vllm:request_queue_time_seconds_count": requests,
                "vllm:request_queue_time_seconds_sum": 0.25 * requests,
                "fraqtl:requests_total": requests,
                "fraqtl:kv_bytes_total": blocks * BLOCK_BYTES[arm],
                "fraqtl:kv_saved_bytes_total": blocks * (4000 - BLOCK_BYTES[arm]),
            }
        )
        base, slope = FIT[arm]
        speed = SPEED[arm] * (1 + asked["concurrency"])
        seconds = requests * asked["output"] / speed
        found = {
            "completed": requests,
            "duration": seconds,
            "output_throughput": speed,
            "total_token_throughput": 2 * speed,
        }
        found |= {"request_throughput": requests / seconds, "request_goodput": requests / seconds / 2}
        itl = base + slope * (asked["input"] + asked["output"] / 2)
        for name, value in (("ttft", 50.0), ("tpot", itl), ("itl", itl)):
            found |= {f"median_{name}_ms": value, f"p99_{name}_ms": 2 * value}
        return found


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, payload: Any) -> None:
        body = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server = self.server
        arm = server.args.kv_format
        answers: dict[str, Any] = {
            "/health": {},
            "/v1/models": {"data": [{"id": "m", "root": "/models/m"}]},
            "/plugins/fraqtl/capacity": {
                "kv_format": arm, "blocks": server.blocks, "block_size": BLOCK_SIZE, "pool_bytes": POOL,
                "max_model_len": 4096, "concurrency": 1.5,
            },
        }  # fmt: skip
        self.answer(server.metrics() if self.path == "/metrics" else answers[self.path])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/load":
            self.answer(self.server.load(asked))
            return
        self.server.write(f"warm {self.server.args.kv_format} {len(asked['prompt'])}")
        self.answer({"choices": [{"text": "x"}]})


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kv-format", default="bf16")
    parser.add_argument("--port", type=int)
    parser.add_argument("--diary", type=Path)
    parser.add_argument("--broken")
    parser.add_argument("--die")
    parser.add_argument("--hang")
    args, _ = parser.parse_known_args()
    if args.broken == args.kv_format:
        sys.exit("fraqtl-serve: this model has no keys to keep")
    server = StandIn(args)
    server.write(f"start {args.kv_format} pid {os.getpid()}")

    def end(*_: Any) -> None:
        server.write(f"end {args.kv_format}")
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    server.serve_forever()


if __name__ == "__main__":
    main()
