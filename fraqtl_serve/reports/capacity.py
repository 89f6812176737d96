"""How much the KV pool holds, and what the same memory would hold in the model's own dtype."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from fraqtl_vllm.accounting.schema import PoolNumbers


class Capacity(BaseModel):
    """The KV pool, over all engines."""

    kv_format: str = Field(description="name of the KV-cache format; k4v4+k8v8 where layers have different ones")
    kv_formats: list[str] | None = Field(description="the format of every layer; null where all have the same")
    block_size: int = Field(description="tokens a block, in the first group of layers that attend")
    block_bytes: int = Field(description="bytes of a block: all layers and ranks, scales and padding included")
    baseline_block_size: int = Field(description="tokens a block in the model's own dtype; other in hybrid models")
    baseline_block_bytes: int = Field(description="bytes of a block in the model's own dtype")
    baseline_dtype: str = Field(description="the model's own dtype")
    ratio: float = Field(description="bytes of a token's block in the model's own dtype, over those in this format")
    pool_bytes: int = Field(description="bytes of all blocks")
    blocks: int = Field(description="blocks in the pool")
    baseline_blocks: int = Field(description="blocks that the same memory would hold in the model's own dtype")
    tokens: int = Field(description="tokens that the pool holds, in sequences of max_model_len")
    baseline_tokens: int = Field(description="the same in the model's own dtype")
    max_model_len: int = Field(description="the longest sequence, in tokens")
    concurrency: float = Field(description="sequences of max_model_len tokens that the pool holds")
    baseline_concurrency: float = Field(description="the same in the model's own dtype")
    attention_bytes: int = Field(description="bytes of keys and values of a sequence of max_model_len")
    state_bytes: int = Field(description="bytes of its states, in hybrid models; 0 in all others")
    padding_bytes: int = Field(description="bytes that its blocks have beside these")
    baseline_attention_bytes: int = Field(description="attention_bytes in the model's own dtype")
    baseline_padding_bytes: int = Field(description="padding_bytes in the model's own dtype")
    pool_use: float | None = Field(description="share of the blocks in use now, 0 to 1; null without metrics")
    running: int | None = Field(description="sequences that the engine works on now; null without metrics")
    waiting: int | None = Field(description="sequences that wait for room now; null without metrics")


USE, RUNNING, WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"


@dataclass(frozen=True)
class Load:
    """What the engines are doing, by vLLM's own gauges; None where it keeps none (--disable-log-stats)."""

    pool_use: float | None = None
    running: int | None = None
    waiting: int | None = None


@dataclass(frozen=True)
class Pool:
    """What is fixed when the engine has started: vLLM's own counts (`fraqtl_vllm.accounting`), over all engines."""

    kv_format: str
    kv_formats: list[str] | None
    baseline_dtype: str
    max_model_len: int
    block_size: int
    block_bytes: int
    blocks: int
    tokens: int
    concurrency: float
    attention_bytes: int
    state_bytes: int
    padding_bytes: int
    baseline_block_size: int
    baseline_block_bytes: int
    baseline_blocks: int
    baseline_tokens: int
    baseline_concurrency: float
    baseline_attention_bytes: int
    baseline_padding_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def ratio(self) -> float:
        """By token: blocks of hybrid models have other numbers of tokens in the model's own dtype."""
        return self.baseline_block_bytes * self.block_size / (self.block_bytes * self.baseline_block_size)

    def capacity(self, load: Load) -> Capacity:
        fixed = vars(self) | {
            "concurrency": round(self.concurrency, 2),
            "baseline_concurrency": round(self.baseline_concurrency, 2),
        }
        return Capacity(**fixed, **vars(load), ratio=round(self.ratio, 4), pool_bytes=self.total_bytes)


def make_pool(
    kv_format: str,
    said: PoolNumbers,
    baseline_dtype: str,
    engines: int = 1,
    kv_formats: list[str] | None = None,
) -> Pool:
    """From what a worker says of its engine's pool. Engines beside each other (data parallel) hold each their own."""
    return Pool(
        kv_format=kv_format,
        kv_formats=kv_formats,
        baseline_dtype=baseline_dtype,
        max_model_len=said["max_model_len"],
        block_size=said["block_size"],
        block_bytes=said["block_bytes"],
        blocks=said["blocks"] * engines,
        tokens=said["tokens"] * engines,
        concurrency=said["concurrency"] * engines,
        attention_bytes=said["attention_bytes"],
        state_bytes=said["state_bytes"],
        padding_bytes=said["padding_bytes"],
        baseline_block_size=said["baseline_block_size"],
        baseline_block_bytes=said["baseline_block_bytes"],
        baseline_blocks=said["baseline_blocks"] * engines,
        baseline_tokens=said["baseline_tokens"] * engines,
        baseline_concurrency=said["baseline_concurrency"] * engines,
        baseline_attention_bytes=said["baseline_attention_bytes"],
        baseline_padding_bytes=said["baseline_padding_bytes"],
    )


def read_load(families: Iterable[Any]) -> Load:
    """From what a Prometheus registry collects: the mean use over engines, the sums of sequences."""
    values: dict[str, list[float]] = {name: [] for name in (USE, RUNNING, WAITING)}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name in values:
            values[sample.name].append(sample.value)
    use, running, waiting = values.values()
    return Load(
        pool_use=sum(use) / len(use) if use else None,
        running=int(sum(running)) if running else None,
        waiting=int(sum(waiting)) if waiting else None,
    )
