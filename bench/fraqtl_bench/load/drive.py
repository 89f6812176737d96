"""One run: `vllm bench serve` against one server at one point, with the server watched meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from fraqtl_bench import bench_serve
from fraqtl_bench.load import metrics
from fraqtl_bench.load.arms import ArmError, Target, last_error
from fraqtl_bench.load.machine import Watch
from fraqtl_bench.load.options import CUSTOM, PREFIX, RANDOM
from fraqtl_bench.load.schema import Latency, Point, Run, Served, Settings

LOOK_SECONDS = 1.0
SETTLE_TRIES = 25
VOCABULARY = range(300, 1000)  # token ids that every model has
UNIQUE_PREFIX = 16  # tokens


def dataset_options(settings: Settings, point: Point) -> list[str]:
    """The prompts of a point.

    vLLM's own `random` counts up from a random token: with a small vocabulary prompts come again, and the prefix
    cache answers. Ours is its `prefix_repetition` with a prefix for each prompt: all tokens random, none shared.
    """
    answer = ["--output-len", str(point.output)]
    if settings.dataset == CUSTOM:
        return ["--dataset-name", CUSTOM, "--dataset-path", str(settings.dataset_path), "--no-oversample", *answer]
    unique = settings.dataset == RANDOM
    prefix = min(UNIQUE_PREFIX, point.input - 1) if unique else settings.prefix_len
    prefixes = point.requests if unique else min(settings.prefixes, point.requests)
    lengths = {"prefix-len": prefix, "suffix-len": point.input - prefix, "num-prefixes": prefixes}
    options = [word for name, value in lengths.items() for word in (f"--prefix-repetition-{name}", str(value))]
    return ["--dataset-name", PREFIX, *options, *answer]


def options(settings: Settings, point: Point, seed: int) -> list[str]:
    """Options of `vllm bench serve`."""
    load = ["--num-prompts", str(point.requests), "--seed", str(seed), "--temperature", str(settings.temperature)]
    if point.rate is not None:
        load += ["--request-rate", str(point.rate)]
    if point.concurrency is not None:
        load += ["--max-concurrency", str(point.concurrency)]
    if settings.slo:
        load += ["--goodput", *(f"{name}:{value:g}" for name, value in settings.slo.items())]
    return [*dataset_options(settings, point), *load, "--percentile-metrics", "ttft,tpot,itl"]


def model_of(http: httpx.Client, target: Target) -> dict[str, Any]:
    """The server's entry in its list of models. Raises ArmError if there is none."""
    try:
        entry: dict[str, Any] = http.get(f"{target.url}/v1/models").raise_for_status().json()["data"][0]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ArmError(f"no server answers at {target.url}: {type(error).__name__}") from error
    return entry


def warm_up(http: httpx.Client, target: Target, settings: Settings, seed: int) -> None:
    """A few requests that count for nothing: first touches of code and memory. Raises ArmError if they fail."""
    model, point, rng = model_of(http, target)["id"], settings.points[-1], random.Random(f"warm {seed}")

    def ask(_: int) -> None:
        prompt = rng.choices(VOCABULARY, k=point.input)
        body = {"model": model, "prompt": prompt, "max_tokens": min(16, point.output), "ignore_eos": True}
        http.post(f"{target.url}/v1/completions", json=body, timeout=1200).raise_for_status()

    try:
        with ThreadPoolExecutor(max(1, settings.warmup)) as pool:
            list(pool.map(ask, range(settings.warmup)))
    except httpx.HTTPStatusError as error:
        target.check_alive(http)
        raise ArmError(f"it refuses requests of this size: {error.response.text[:200]}") from error
    except httpx.HTTPError as error:
        target.check_alive(http)
        raise ArmError(f"it doesn't answer: {type(error).__name__}") from error


def drive(http: httpx.Client, target: Target, settings: Settings, point: Point, repeat: int, seed: int) -> Run:
    """Raises ArmError if not every request was answered, and says whether the server died."""
    model = model_of(http, target)
    gauges, watch = metrics.Gauges(), Watch(target.started)
    before = metrics.read(http, target.url)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = settings.tokenizer or model["root"]
        log = Path(folder) / "log"
        line = bench_serve.command(target.url, model["id"], tokenizer, folder, *options(settings, point, seed))
        status = _run_watched(line, log, target, http, gauges)
        found, said = bench_serve.result(folder), log.read_text(errors="replace")
    others = watch.cores()
    completed = found.get("completed", 0)
    if status or completed < point.requests:
        _wait_for_death(target, http)
        why = last_error(said) or f"exit status {status}"
        raise ArmError(f"at {point.name} {completed} of {point.requests} requests were answered: {why}")
    served = metrics.gained(before, _settled(http, target, before, point), gauges)
    return to_run(found, target.arm, repeat, point, served, others)


def to_run(
    found: dict[str, Any], arm: str, repeat: int, point: Point, served: Served, other_cores: float | None = None
) -> Run:
    ttft, tpot, itl = (
        Latency(median=found[f"median_{name}_ms"], p99=found[f"p99_{name}_ms"]) for name in ("ttft", "tpot", "itl")
    )
    return Run(
        arm=arm,
        repeat=repeat,
        point=point,
        seconds=found["duration"],
        completed=found["completed"],
        output_tokens_per_s=found["output_throughput"],
        total_tokens_per_s=found["total_token_throughput"],
        requests_per_s=found["request_throughput"],
        goodput=found.get("request_goodput"),
        ttft=ttft,
        tpot=tpot,
        itl=itl,
        served=served,
        other_cores=other_cores,
    )


def _run_watched(line: list[str], log: Path, target: Target, http: httpx.Client, gauges: metrics.Gauges) -> int:
    """The client's exit status. Whatever happens, no process of it stays behind."""
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_SECONDS)
            gauges.look(http, target.url)
            target.check_alive(http)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_death(target: Target, http: httpx.Client) -> None:
    """Requests failed: vLLM looks every few seconds if its engine is alive, so give it time to say so."""
    for _ in range(SETTLE_TRIES):
        target.check_alive(http)
        time.sleep(0.2)


def _settled(http: httpx.Client, target: Target, before: metrics.Snapshot, point: Point) -> metrics.Snapshot:
    """The metrics when every request has been counted, which happens just after its answer is out."""
    for _ in range(SETTLE_TRIES):
        after = metrics.read(http, target.url)
        if after.values[metrics.FINISHED] - before.values[metrics.FINISHED] >= point.requests:
            break
        time.sleep(0.2)
    return after
