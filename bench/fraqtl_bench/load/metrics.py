"""What a server says of itself: counters before and after a run, gauges while it goes, the size of its pool."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

import httpx

from fraqtl_bench.load.schema import Capacity, Served

RUNNING, WAITING, USE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
INFO = "vllm:cache_config_info"
FINISHED = "vllm:request_success_total"


def client() -> httpx.Client:
    """With the key of OPENAI_API_KEY, which `vllm bench serve` sends, too."""
    key = os.environ.get("OPENAI_API_KEY")
    return httpx.Client(timeout=20, headers={"Authorization": f"Bearer {key}"} if key else {})


@dataclass(frozen=True)
class Snapshot:
    """Samples of /metrics by name, added up over engines and other labels; `info`: the labels of the cache's info."""

    values: Counter[str]
    info: dict[str, str]


def read(http: httpx.Client, url: str) -> Snapshot:
    """Raises httpx.HTTPError if the server doesn't answer."""
    from prometheus_client.parser import text_string_to_metric_families

    values: Counter[str] = Counter()
    info: dict[str, str] = {}
    for family in text_string_to_metric_families(http.get(f"{url}/metrics").raise_for_status().text):
        for sample in family.samples:
            if sample.name == INFO:
                info = dict(sample.labels)
            elif not sample.name.endswith("_bucket"):
                values[sample.name] += sample.value  # type: ignore[assignment]
    return Snapshot(values, info)


@dataclass
class Gauges:
    """Looked at once in a while; an engine sets them after every step."""

    running: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    use: list[float] = field(default_factory=list)

    def look(self, http: httpx.Client, url: str) -> None:
        try:
            values = read(http, url).values
        except httpx.HTTPError:
            return  # whether the server is alive is another question
        if values[RUNNING] or values[WAITING]:  # else the client hasn't begun, or is done
            self.running.append(values[RUNNING])
            self.waiting.append(values[WAITING])
            self.use.append(values[USE])


def gained(before: Snapshot, after: Snapshot, gauges: Gauges) -> Served:
    """The difference, as means of a request where that makes sense."""
    gain: Counter[str] = Counter({name: value - before.values[name] for name, value in after.values.items()})
    requests = gain[FINISHED]
    ended = gain["fraqtl:requests_total"]

    def mean_ms(name: str) -> float | None:
        count = gain[f"{name}_count"]
        return 1e3 * gain[f"{name}_sum"] / count if count else None

    queries = gain["vllm:prefix_cache_queries_total"]
    return Served(
        requests=int(requests),
        prompt_tokens=int(gain["vllm:prompt_tokens_total"]),
        output_tokens=int(gain["vllm:generation_tokens_total"]),
        preemptions=int(gain["vllm:num_preemptions_total"]),
        queue_ms=mean_ms("vllm:request_queue_time_seconds"),
        prefill_ms=mean_ms("vllm:request_prefill_time_seconds"),
        decode_ms=mean_ms("vllm:request_decode_time_seconds"),
        prefix_hits=gain["vllm:prefix_cache_hits_total"] / queries if queries else None,
        kv_bytes=gain["fraqtl:kv_bytes_total"] / ended if ended else None,
        saved_bytes=gain["fraqtl:kv_saved_bytes_total"] / ended if ended else None,
        running_mean=sum(gauges.running) / len(gauges.running) if gauges.running else None,
        running_peak=int(max(gauges.running)) if gauges.running else None,
        waiting_peak=int(max(gauges.waiting)) if gauges.waiting else None,
        pool_use_peak=max(gauges.use) if gauges.use else None,
    )


def capacity(http: httpx.Client, url: str) -> Capacity | None:
    """From vLLM's own metrics, and from our route where there is one; None if the server tells neither."""
    info = read(http, url).info
    ours = http.get(f"{url}/plugins/fraqtl/capacity")
    own = ours.json() if ours.status_code == 200 else {}
    blocks = own.get("blocks") or _whole(info.get("num_gpu_blocks"))
    block_size = own.get("block_size") or _whole(info.get("block_size"))
    if not blocks or not block_size:
        return None
    longest = info.get("kv_cache_max_concurrency")
    return Capacity(
        kv_format=own.get("kv_format") or info.get("cache_dtype"),
        tokens=_whole(info.get("kv_cache_size_tokens")) or blocks * block_size,
        blocks=blocks,
        block_size=block_size,
        pool_bytes=own.get("pool_bytes"),
        max_model_len=own.get("max_model_len"),
        full_length=float(longest) if longest and longest != "None" else own.get("concurrency"),
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def add_request_size(found: Capacity, tokens: float) -> None:
    """How many requests of `tokens` tokens, prompt and answer, fit at once.

    The last token of an answer is never written, and one block of the pool is vLLM's own.
    """
    blocks_each = -(-max(1, round(tokens) - 1) // found.block_size)
    found.request_tokens = tokens
    found.requests = (found.blocks - 1) // blocks_each
