"""The report of a load test, typed and versioned: what `load.json` holds, and what the other files are made from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

VERSION = 1


class Part(BaseModel):
    """Unknown fields are refused, so that a misspelt one is an error and not an empty column."""

    model_config = ConfigDict(extra="forbid")


class Point(Part):
    """One load. Either `concurrency` requests at a time, each followed by the next, or `rate` requests a second.

    kind: `ladder` for the curves, `context` for the fit of inter-token latency. input, output: tokens asked for.
    """

    kind: str = "ladder"
    concurrency: int | None = None
    rate: float | None = None
    input: int
    output: int
    requests: int

    @property
    def name(self) -> str:
        load = f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"
        return f"context {self.input}, {load}" if self.kind == "context" else load


class Settings(Part):
    """What a run depends on; a resumed run must have the same."""

    arms: list[str]
    urls: dict[str, str]
    model: str | None
    tokenizer: str | None
    kv_memory_bytes: int | None
    gpu_memory_utilization: float | None
    server_args: list[str]
    dataset: str
    dataset_path: str | None
    prefix_len: int
    prefixes: int
    points: list[Point]
    repeats: int
    warmup: int
    slo: dict[str, float]
    temperature: float
    seed: int


class Latency(Part):
    """Milliseconds."""

    median: float
    p99: float


class Served(Part):
    """What the server's own metrics gained during one run, and what its gauges showed, looked at once a second.

    queue_ms, prefill_ms, decode_ms: mean of a request. prefix_hits: share of the prompts' tokens that were found in the
    prefix cache, before any preemption. *_bytes: KV bytes of a request when it ended, by our own counters; None from a
    server that has none. pool_use_peak: share of the blocks.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    queue_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    prefix_hits: float | None
    kv_bytes: float | None
    saved_bytes: float | None
    running_mean: float | None
    running_peak: int | None
    waiting_peak: int | None
    pool_use_peak: float | None


class Run(Part):
    """One `vllm bench serve`.

    Throughputs are per second of its duration; goodput: requests a second within the SLO. other_cores: how many cores
    other programs kept busy meanwhile; None beside a server that was not started for the run.
    """

    arm: str
    repeat: int
    point: Point
    seconds: float
    completed: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    goodput: float | None
    ttft: Latency
    tpot: Latency
    itl: Latency
    served: Served
    other_cores: float | None = None


class Capacity(Part):
    """The pool by the server's own numbers.

    tokens: as vLLM counts them. requests: of this load's size (`request_tokens`, prompt and answer, the longest mean of
    a point) that fit at once, in whole blocks. full_length: sequences of max_model_len, vLLM's "maximum concurrency".
    """

    kv_format: str | None
    tokens: int
    blocks: int
    block_size: int
    pool_bytes: int | None
    max_model_len: int | None
    full_length: float | None
    request_tokens: float | None = None
    requests: int | None = None


class Spread(Part):
    """Over the repeats."""

    median: float
    low: float
    high: float


class Summary(Part):
    """One arm at one point over its repeats. ratios: to the first arm in the same repeat."""

    point: Point
    repeats: int
    values: dict[str, Spread]
    ratios: dict[str, Spread]
    prompt_share: float | None = (
        None  # time to the first token when alone x requests / duration: what prompts alone take
    )
    on_frontier: bool = False


class Fit(Part):
    """ITL = slope x context + intercept, least squares over the medians; context: prompt and half of the answer.

    break_even: tokens of context from which this arm is as fast as the first; None if there is none above 0.
    """

    concurrency: int
    points: list[tuple[float, float]]  # context in tokens, ITL in ms
    slope_us_per_1k: float
    intercept_ms: float
    r_squared: float
    slope_ratio: float | None = None
    break_even: float | None = None
    verdict: str = ""


class ArmReport(Part):
    """reason: why the arm did not run, or not to its end."""

    name: str
    command: str
    reason: str | None = None
    capacity: Capacity | None = None
    capacity_ratio: float | None = None
    summaries: list[Summary] = []
    fit: Fit | None = None


class Report(Part):
    """`load.json`. ended: `complete`, or what ended the run before all was measured."""

    schema_version: int = VERSION
    provenance: dict[str, Any]
    settings: Settings
    ended: str
    seconds: float
    arms: list[ArmReport]
    runs: list[Run]
