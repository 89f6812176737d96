"""Prometheus metrics under `fraqtl:`, beside vLLM's own on the server's /metrics.

With several API server processes prometheus_client keeps the values in files that any of them can read
(its multiprocess mode, which vLLM switches on): counters and histograms add up by themselves.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from fraqtl_serve.reports.capacity import Pool
from fraqtl_serve.reports.records import RequestRecord

LAYOUT = "LBHNC"  # layer, block, head, token, content: one head's tokens lie together in a block
BUCKETS = tuple(4**power for power in range(6, 19))  # 4 KiB to 64 GiB


class Metrics:
    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        of: dict[str, Any] = {"registry": registry}
        self.requests = Counter("fraqtl:requests", "Requests that have ended.", ["status"], **of)
        self.tokens = Counter("fraqtl:kv_tokens", "KV entries written by requests that have ended.", **of)
        self.bytes = Counter("fraqtl:kv_bytes", "KV bytes held by requests when they ended.", **of)
        self.saved = Counter("fraqtl:kv_saved_bytes", "KV bytes saved against the model's own dtype.", **of)
        self.request_bytes = Histogram(
            "fraqtl:request_kv_bytes", "KV bytes that a request held when it ended.", buckets=BUCKETS, **of
        )
        self.request_saved = Histogram(
            "fraqtl:request_kv_saved_bytes",
            "KV bytes that a request saved against the model's own dtype.",
            buckets=BUCKETS,
            **of,
        )
        # Every process sets the same values.
        same: dict[str, Any] = {"multiprocess_mode": "mostrecent", **of}
        self.pool_bytes = Gauge("fraqtl:pool_bytes", "Bytes of the KV pool over all ranks.", **same)
        self.pool_tokens = Gauge("fraqtl:pool_tokens", "Tokens that the KV pool holds, by vLLM's count.", **same)
        self.pool_baseline_tokens = Gauge(
            "fraqtl:pool_baseline_tokens", "Tokens that the same memory would hold in the model's own dtype.", **same
        )
        self.ratio = Gauge("fraqtl:ratio", "KV bytes in the model's own dtype over those of the pool.", **same)
        # prometheus_client's Info does not work in multiprocess mode.
        self.info = Gauge("fraqtl:info", "The KV-cache format and its layout.", ["kv_format", "layout"], **same)
        for status in ("finished", "aborted"):
            self.requests.labels(status)  # a rate needs a zero to begin with

    def set_pool(self, pool: Pool) -> None:
        self.pool_bytes.set(pool.total_bytes)
        self.pool_tokens.set(pool.tokens)
        self.pool_baseline_tokens.set(pool.baseline_tokens)
        self.ratio.set(pool.ratio)
        self.info.labels(pool.kv_format, LAYOUT).set(1)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self.requests.labels(record.status).inc()
        report = record.report
        if report is None:
            return
        self.tokens.inc(report.tokens)
        self.bytes.inc(report.bytes)
        self.saved.inc(report.saved_bytes)
        self.request_bytes.observe(report.bytes)
        self.request_saved.observe(report.saved_bytes)
