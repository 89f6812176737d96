"""Attributes on vLLM's own spans, seen by an exporter in memory."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.v1.engine.output_processor import OutputProcessor

from fraqtl_serve.engine import tracing
from fraqtl_serve.reports.report import KVReport, Ledger
from tests.serve.fake_engine import account

REPORTS: dict[str, KVReport | None] = {
    "a": Ledger("k4v4", accounts={"a": account([1, 2], tokens=20)}).report(),
    "b": Ledger("k4v4", accounts={"b": account([3], tokens=5)}).report(),
}
ADDED = {
    "fraqtl.kv_format": "k4v4",
    "fraqtl.tokens": 20,
    "fraqtl.blocks": 2,
    "fraqtl.shared_blocks": 0,
    "fraqtl.loaded_blocks": 0,
    "fraqtl.block_size": 16,
    "fraqtl.bytes": 4352,
    "fraqtl.baseline_bytes": 16384,
    "fraqtl.saved_bytes": 12032,
    "fraqtl.ratio": 3.7647,
}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Spans of this process go here, as they go to --otlp-traces-endpoint in a server."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def make_processor(*, enabled: bool = True) -> OutputProcessor:
    return OutputProcessor(None, log_stats=True, tracing_enabled=enabled)


def finish(processor: OutputProcessor, request_id: str, trace_headers: Any = None) -> None:
    """What vLLM does when a sequence has finished."""
    times = {"arrival_time": 1.0, "queued_ts": 1.0, "scheduled_ts": 1.1, "first_token_ts": 1.2, "last_token_ts": 1.5}
    state = SimpleNamespace(
        stats=SimpleNamespace(first_token_latency=0.2, num_generation_tokens=5, **times),
        prompt_token_ids=[1, 2],
        prompt_embeds=None,
        external_req_id=f"external-{request_id}",
        top_p=None,
        max_tokens_param=5,
        temperature=None,
        n=1,
    )
    output = SimpleNamespace(request_id=request_id, trace_headers=trace_headers)
    processor.do_tracing(output, state, SimpleNamespace(iteration_timestamp=2.0))  # type: ignore[arg-type]


def test_span_of_a_sequence_carries_its_report(exporter: InMemorySpanExporter) -> None:
    processor = make_processor()
    tracing.watch(processor, REPORTS.get)
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    finish(processor, "a", parent)
    finish(processor, "b")
    first, second = exporter.get_finished_spans()
    given = dict(first.attributes or {})
    assert ADDED.items() <= given.items()
    assert (given["gen_ai.request.id"], given["gen_ai.usage.prompt_tokens"]) == ("external-a", 2)
    assert f"{first.context.trace_id:032x}" in parent["traceparent"]
    assert dict(second.attributes or {})["fraqtl.bytes"] == 2176


def test_span_without_a_report_is_left_alone(exporter: InMemorySpanExporter) -> None:
    processor = make_processor()
    tracing.watch(processor, REPORTS.get)
    finish(processor, "unknown")
    finish(processor, "a")
    with trace.get_tracer("x").start_as_current_span("something else"):
        pass
    marked = [
        any(name.startswith("fraqtl") for name in span.attributes or {}) for span in exporter.get_finished_spans()
    ]
    assert marked == [False, True, False]


def test_nothing_happens_without_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "__import__", no_opentelemetry(builtins.__import__))
    processor = make_processor(enabled=False)
    before = processor.do_tracing
    tracing.watch(processor, REPORTS.get)
    assert processor.do_tracing == before


def no_opentelemetry(real: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    return refuse


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    logger = logging.getLogger("test")
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(tracing, "init_logger", lambda name: logger)
    return said


def test_missing_packages_are_said(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    processor = make_processor()
    before = processor.do_tracing
    monkeypatch.setattr(builtins, "__import__", no_opentelemetry(builtins.__import__))
    tracing.watch(processor, REPORTS.get)
    monkeypatch.undo()
    assert processor.do_tracing == before
    assert warnings == ["spans carry no KV memory: No module named 'opentelemetry'"]


def test_provider_of_another_kind_is_said(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", trace.NoOpTracerProvider())
    processor = make_processor()
    tracing.watch(processor, REPORTS.get)
    assert warnings == ["spans carry no KV memory: NoOpTracerProvider takes no span processor"]
    finish(processor, "a")
