"""The KV memory of a sequence on its OpenTelemetry span.

With --otlp-traces-endpoint vLLM makes one span, `llm_request`, for every sequence that finishes, and ends it at
once. A span processor is told of spans as they start, when they can still take attributes; which sequence the
span is of, it learns from a context variable around the method of vLLM that makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fraqtl_serve._vllm import init_logger
from fraqtl_serve.engine import hooks
from fraqtl_serve.reports.report import KVReport

SPAN = "llm_request"
_report: ContextVar[KVReport | None] = ContextVar("fraqtl_span_report", default=None)


def attributes(report: KVReport) -> dict[str, str | int | float]:
    """`fraqtl.kv_format`, `fraqtl.bytes` and so on: the report's own names."""
    return {f"fraqtl.{name}": value for name, value in report.model_dump(exclude={"version"}).items()}


def watch(processor: Any, report_of: Callable[[str], KVReport | None]) -> None:
    """Have spans of `processor` (vLLM's OutputProcessor) carry the report of their sequence, by the engine's id.

    Does nothing where tracing is off, and only warns where OpenTelemetry is not installed.
    """
    if not processor.tracing_enabled:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import SpanProcessor
    except ImportError as error:
        init_logger(__name__).warning("spans carry no KV memory: %s", error)
        return

    class AddReport(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            report = _report.get()
            if report is not None and span.name == SPAN:
                span.set_attributes(attributes(report))

    provider: Any = trace.get_tracer_provider()
    if not hasattr(provider, "add_span_processor"):
        init_logger(__name__).warning("spans carry no KV memory: %s takes no span processor", type(provider).__name__)
        return
    provider.add_span_processor(AddReport())

    def with_report(do_tracing: Callable[..., None]) -> Callable[..., None]:
        def watched(engine_core_output: Any, *args: Any, **kwargs: Any) -> None:
            token = _report.set(report_of(engine_core_output.request_id))
            try:
                do_tracing(engine_core_output, *args, **kwargs)
            finally:
                _report.reset(token)

        return watched

    hooks.SPANS.wrap(processor, with_report)
