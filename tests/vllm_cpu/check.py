"""What a CPU build of vLLM serves with our plugin installed, with our backend and without, and what is refused.

    python -m tests.vllm_cpu.check --out bench/results/cpu/vllm_cpu.json

Wants an environment with such a build, which run.sh makes. Starts real servers with the demo model, asks them, prints a
line for each check; its status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import torch

from fraqtl_bench import results
from fraqtl_bench.server import STOCK_SERVER, Server, remove_log, running, start, stop
from fraqtl_vllm.platform import native_ops
from fraqtl_vllm.platform.experts import ACTIVATIONS

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "fraqtl_serve" / "demo_model"
MEMORY = ("--kv-cache-memory-bytes", str(64 << 20))
FRAQTL = ("--attention-backend", "FRAQTL")
WITHOUT_LAUNCHER = ("vllm.entrypoints.openai.api_server",)  # vllm-cpu's `vllm` doesn't start without our plugin
QUESTION = "The code for apple is 4821. The code for tiger is 1357.\nWhat is the code for apple?"
LEAST_RATIO = 3.7
REFUSED = re.compile(r"(?:UnsupportedError: |Value error, )(.*?)(?: \[type=|$)", re.MULTILINE)
Found = dict[str, Any]


def chat(server: Server) -> Found:
    """The greedy answer of whatever model is served; our report stands in it where there is one."""
    with httpx.Client(base_url=server.url, timeout=300) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        question = [{"role": "user", "content": QUESTION}]
        body = {"model": model, "messages": question, "max_tokens": 24, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return {"text": answer["choices"][0]["message"]["content"], "report": answer.get("fraqtl")}


def pool(server: Server) -> Found:
    """vLLM's own word on its pool: tokens, from its log, and the block size, from its metrics."""
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", server.log)
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    block = re.search(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', metrics)
    assert tokens and block, "vLLM did not say how large its pool is"
    return {"tokens": int(tokens[1].replace(",", "")), "block_size": int(block[1])}


def is_packed(server: Server) -> bool:
    return "Packed KV cache: 4 attention layers, all FRAQTL, in pages of k4v4" in server.log


def doctor() -> Found:
    done = subprocess.run([sys.executable, "-m", "fraqtl_serve", "doctor", "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    found = {key: report[key] for key in ("vllm_distribution", "platform", "backend", "problems")}
    assert done.returncode == 0 and not report["problems"], found
    assert report["platform"] == "NativeCpu" and "native operators" in report["backend"], found
    return found


def launcher() -> Found:
    """vLLM's command, which looks for a distribution `vllm`."""
    done = subprocess.run([Path(sys.executable).parent / "vllm", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    return {"version": done.stdout.strip().splitlines()[-1]}


def fraqtl_serve() -> Found:
    with running(*MEMORY) as server:
        said, capacity = chat(server), httpx.get(f"{server.url}/plugins/fraqtl/capacity", timeout=30).json()
        assert is_packed(server), "the check at start left no line"
        found = {key: capacity[key] for key in ("kv_format", "block_size", "tokens", "baseline_tokens", "ratio")}
        found |= {"seen_by_vllm": pool(server), "text": said["text"], "report_ratio": said["report"]["ratio"]}
    assert capacity["ratio"] >= LEAST_RATIO and said["report"]["ratio"] >= LEAST_RATIO, found
    assert capacity["tokens"] / capacity["baseline_tokens"] >= LEAST_RATIO, found
    assert found["seen_by_vllm"] == {"tokens": capacity["tokens"], "block_size": 16}, found
    assert "4821" in said["text"], found
    return found


def of_model(module: tuple[str, ...]) -> tuple[str, ...]:
    return (str(MODEL),) if module == STOCK_SERVER else ("--model", str(MODEL))


def vllm_serve(*flags: str, module: tuple[str, ...] = STOCK_SERVER, plugins: str | None = None) -> Found:
    """What vLLM's own command says of its pool, and its answer."""
    environment = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    with running(*of_model(module), *MEMORY, *flags, module=module, environment=environment) as server:
        return {**pool(server), "packed": is_packed(server), "text": chat(server)["text"]}


def vllm_serve_packed(plain: Found, *flags: str) -> Found:
    found = vllm_serve(*FRAQTL, *flags)
    found["times_the_tokens_of_vllms_own_cache"] = round(found["tokens"] / plain["tokens"], 3)
    assert found["packed"] and found["block_size"] == 16, found
    assert found["times_the_tokens_of_vllms_own_cache"] >= LEAST_RATIO, found
    assert "4821" in found["text"], found
    return found


def plain_vllm_serve(plain: Found) -> Found:
    """With our plugin installed and nothing asked of it: what vLLM serves without the plugin."""
    found = vllm_serve()
    assert not found["packed"] and "4821" in found["text"] and found == plain, (
        f"{found} with our plugin, {plain} without"
    )
    return found


def refused(sentence: str, *flags: str, module: tuple[str, ...] = STOCK_SERVER, target: str = "cuda") -> Found:
    server = start(*of_model(module), *MEMORY, *flags, module=module, environment={"VLLM_TARGET_DEVICE": target})
    try:
        status = server.process.wait(180)
        said = REFUSED.findall(server.log)
    finally:
        stop(server)
    assert status != 0 and said and sentence in said[-1], f"status {status}: {said or server.log[-1500:]}"
    remove_log(server)
    return {"said": said[-1]}


@contextmanager
def native() -> Iterator[Any]:
    """vLLM's compiled operators in this process."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    yield torch.ops._C


def same_activations() -> Found:
    """Our torch versions against the compiled ones: greatest difference, in float32."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 3
    apart = {}
    with native() as compiled:
        for name, ours in (
            ("gelu_new", native_ops.gelu_tanh_),
            ("gelu_fast", native_ops.gelu_tanh_),
            ("gelu_quick", native_ops.gelu_quick_),
        ):
            theirs, own = torch.empty_like(x), torch.empty_like(x)
            getattr(compiled, name)(theirs, x)
            ours(own, x)
            apart[name] = float((theirs - own).abs().max())
    assert max(apart.values()) < 1e-5, apart
    return apart


def same_experts() -> Found:
    torch.manual_seed(0)
    tokens, hidden, inner, experts, k = 33, 64, 96, 6, 2
    x = torch.randn(tokens, hidden)
    w13, w2 = torch.randn(experts, 2 * inner, hidden) / 8, torch.randn(experts, hidden, inner) / 10
    chosen = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, k)
    apart = {}
    with native() as compiled:
        packed = [torch.empty_like(w) for w in (w13, w2)]
        for weight, target in zip((w13, w2), packed, strict=True):
            compiled.prepack_moe_weight(weight, target, "vec")
        for activation in ACTIVATIONS:
            theirs, own = torch.empty_like(x), torch.empty_like(x)
            compiled.cpu_fused_moe(theirs, x, *packed, None, None, weights, chosen, False, activation, "vec")
            native_ops.fused_experts(own, x, w13, w2, None, None, weights, chosen, False, activation, "vec")
            apart[activation] = float((theirs - own).abs().max())
    assert max(apart.values()) < 1e-4, apart
    return apart


class Checks:
    """A line each on the terminal, all of them in the result."""

    def __init__(self) -> None:
        self.rows: list[Found] = []

    def run(self, name: str, check: Callable[[], Found]) -> Found:
        began, found, error = time.monotonic(), dict[str, Any](), None
        try:
            found = check()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        row = {"check": name, "passed": error is None, "seconds": round(time.monotonic() - began, 1), **found}
        self.rows.append(row if error is None else {**row, "error": error})
        print(f"{'FAIL' if error else 'ok  '} {name}: {error or found}", flush=True)
        return found

    def run_all(self) -> None:
        self.run("doctor knows the platform", doctor)
        self.run("vLLM's command starts", launcher)
        self.run("our gelu_new, gelu_fast and gelu_quick are the compiled ones", same_activations)
        self.run("our mixture of experts is the compiled one", same_experts)
        self.run("fraqtl-serve serve is packed", fraqtl_serve)
        without = partial(vllm_serve, module=WITHOUT_LAUNCHER, plugins="")
        plain = self.run("vLLM's own cache, without our plugin", without)
        if plain:
            self.run("vllm serve without our backend is the same", partial(plain_vllm_serve, plain))
            self.run("vllm serve --attention-backend FRAQTL is packed", partial(vllm_serve_packed, plain))
            self.run("the same without torch.compile", partial(vllm_serve_packed, plain, "--enforce-eager"))
        settings = ("--additional-config", '{"fraqtl": {"kv_format": "k8v8"}}')
        self.run("settings without the backend", partial(refused, "add --attention-backend FRAQTL", *settings))
        past_us = partial(refused, "unset VLLM_TARGET_DEVICE", *FRAQTL, module=WITHOUT_LAUNCHER, target="cpu")
        self.run("a platform that was chosen past our plugin", past_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    try:
        vllm_cpu = version("vllm-cpu")
    except PackageNotFoundError:
        sys.exit("check.py: vllm-cpu is not installed here: tests/vllm_cpu/run.sh makes an environment that has it")
    checks = Checks()
    checks.run_all()
    failed = sum(not row["passed"] for row in checks.rows)
    print(f"{len(checks.rows) - failed} passed, {failed} failed")
    if args.out:
        command = f"tests/vllm_cpu/run.sh FOLDER --out {args.out}"
        results.save(args.out, {"command": command, "vllm-cpu": vllm_cpu, "failed": failed, "checks": checks.rows})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
