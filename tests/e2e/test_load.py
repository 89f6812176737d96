"""`fraqtl-bench load` against a real server, with the real `vllm bench serve`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fraqtl_bench.cli import main
from fraqtl_bench.load.schema import Report
from tests.e2e.server import Server


def test_load_of_a_running_server(demo_server: Server, tmp_path: Path) -> None:
    few = ["--concurrency", "2", "--requests-each", "2", "--min-requests", "1", "--repeats", "1", "--warmup", "1"]
    line = ["load", "--url", f"demo={demo_server.url}", "--input", "50", "--output", "8", *few, "--slo", "ttft:60000"]
    with pytest.raises(SystemExit) as ended:
        main([*line, "--no-figures", "--out", str(tmp_path)])
    assert not ended.value.code
    report = Report.model_validate_json((tmp_path / "load.json").read_text())
    [arm], [run] = report.arms, report.runs
    assert arm.capacity and arm.capacity.kv_format == "k4v4"
    assert arm.capacity.tokens == arm.capacity.blocks * arm.capacity.block_size
    assert (run.completed, run.served.requests, run.served.output_tokens) == (4, 4, 32)
    assert run.served.prompt_tokens / 4 == pytest.approx(50, abs=3)  # random text isn't always as long as asked for
    assert run.served.prefix_hits == 0 and run.served.preemptions == 0
    assert run.goodput == pytest.approx(run.requests_per_s) and run.served.queue_ms is not None
    assert run.itl.median > 0 and run.ttft.p99 >= run.ttft.median > 0
    assert run.served.kv_bytes and run.served.saved_bytes
    assert run.served.saved_bytes / run.served.kv_bytes == pytest.approx(256 / 68 - 1)  # head size 64
