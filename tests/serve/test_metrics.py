from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fraqtl_serve.reports.metrics import Metrics
from fraqtl_serve.reports.records import RequestRecord
from fraqtl_serve.reports.report import Ledger
from tests.serve.fake_engine import account
from tests.serve.pools import pool

POOL = pool()


def record(status: Any = "finished", *accounts: dict[str, Any]) -> RequestRecord:
    report = Ledger("k4v4", accounts={str(i): a for i, a in enumerate(accounts)}).report()
    return RequestRecord(id="r", endpoint="/v1/completions", status=status, time=0, report=report)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"fraqtl:{name}", labels)


def test_requests_are_counted_by_status(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    assert value(registry, "requests_total", status="aborted") == 0
    for item in (record("finished", account([1])), record("aborted", account([2])), record("aborted")):
        metrics.observe(item)
    assert value(registry, "requests_total", status="finished") == 1
    assert value(registry, "requests_total", status="aborted") == 2
    assert value(registry, "request_kv_bytes_count") == 2  # of the third nothing is known


def test_sums(registry: CollectorRegistry) -> None:
    metrics = Metrics(registry)
    metrics.observe(record("finished", account([1, 2], tokens=20), account([1, 3], tokens=22)))
    metrics.observe(record("aborted", account([4], tokens=3)))
    assert value(registry, "kv_tokens_total") == 45
    assert value(registry, "kv_bytes_total") == value(registry, "request_kv_bytes_sum") == 4 * 2176
    assert value(registry, "kv_saved_bytes_total") == value(registry, "request_kv_saved_bytes_sum") == 4 * 6016


def test_buckets(registry: CollectorRegistry) -> None:
    Metrics(registry).observe(record("finished", account([1, 2])))  # 4352 bytes
    assert value(registry, "request_kv_bytes_bucket", le="4096.0") == 0
    assert value(registry, "request_kv_bytes_bucket", le="16384.0") == 1


def test_pool(registry: CollectorRegistry) -> None:
    Metrics(registry).set_pool(POOL)
    assert value(registry, "pool_bytes") == 2176000
    assert value(registry, "ratio") == 8192 / 2176
    assert (value(registry, "pool_tokens"), value(registry, "pool_baseline_tokens")) == (16000, 4240)
    assert value(registry, "info", kv_format="k4v4", layout="LBHNC") == 1


ONE_PROCESS = """
import json, sys
from prometheus_client import CollectorRegistry, multiprocess
from fraqtl_serve.reports.capacity import Pool
from fraqtl_serve.reports.metrics import Metrics
from fraqtl_serve.reports.records import RequestRecord
pool, record = json.loads(sys.argv[1])
metrics = Metrics()
metrics.set_pool(Pool(**pool))
metrics.observe(RequestRecord(**record))
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(json.dumps([[s.name, s.labels, s.value] for family in registry.collect() for s in family.samples]))
"""


def test_processes_add_up(tmp_path: Path) -> None:
    said = record("finished", account([1]))
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-c", ONE_PROCESS, json.dumps([asdict(POOL), said.model_dump()])]
        done = subprocess.run(command, capture_output=True, env=environment, check=True, cwd=Path(__file__).parents[2])
    samples = {name: value for name, labels, value in json.loads(done.stdout) if "le" not in labels}
    assert samples["fraqtl:kv_bytes_total"] == samples["fraqtl:request_kv_bytes_sum"] == 2 * 2176
    assert samples["fraqtl:request_kv_bytes_count"] == 2
    assert samples["fraqtl:pool_bytes"] == 2176000
    assert samples["fraqtl:info"] == 1
