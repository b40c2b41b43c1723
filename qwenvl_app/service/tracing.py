"""OpenTelemetry: a trace for every request that generates, where an OTLP endpoint is set.

Through the official packages, configured by their own environment variables
(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/). Without an
endpoint none of them is imported, and nothing runs. A trace is made once, when its request has
ended, from what the record has noted. It has no text, no picture and no name of a file.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qwenvl_app.service.metrics import REASONS
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

log = logging.getLogger(__name__)

# W3C Trace Context: https://www.w3.org/TR/trace-context/
HEADERS = ("traceparent", "tracestate")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_LAST_EXPORT_S = 3  # at a stop; the exporter would try for 10 with a collector that is away


class Traces:
    """Makes and exports them, if there is a provider. Methods may be called on any thread."""

    def __init__(self, provider: TracerProvider | None = None):
        self._provider = provider
        self._tracer = provider.get_tracer("qwenvl", VERSION) if provider else None

    def export(
        self, record: RequestRecord, method: str, route: str, status: int, sent: Mapping[str, str]
    ) -> str | None:
        """Make the trace of a request that ends now; ``sent``: HEADERS that came with it.

        Returns the trace's id, which is the caller's if it has one. Whether it is exported is the
        sampler's choice. A thread of the exporter's sends it.
        """
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        now, unix = time.monotonic(), time.time_ns()

        def at(monotonic: float) -> int:
            return unix - int((now - monotonic) * 1e9)

        root = self._tracer.start_span(
            f"{method} {route}",
            TraceContextTextMapPropagator().extract(sent),
            SpanKind.SERVER,
            dict(_attributes(record, method, route, status)),
            start_time=at(record.arrived),
        )
        if REASONS.get(record.reason or "", status) >= 500:
            root.set_status(StatusCode.ERROR)
        for name, began, ended in _parts(record):
            child = self._tracer.start_span(name, set_span_in_context(root), start_time=at(began))
            child.end(at(ended))
        root.end(unix)
        return format_trace_id(root.get_span_context().trace_id)

    def close(self) -> None:
        """Export what there is, for a moment; any number of times."""
        if self._provider is None:
            return
        thread = threading.Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
        thread.start()
        thread.join(_LAST_EXPORT_S)


def start() -> Traces:
    """Start the exporter if the environment names an endpoint; its thread is this process's own.

    What is wrong with it is a line in the log: the same environment is often many services', and
    answers matter more than traces.
    """
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not endpoint or off or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return Traces()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning(
            "%s is set, but %s is not installed: there will be no traces; for them, "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
            *(endpoint, error.name),
        )
        return Traces()
    resource = Resource.create({"service.version": VERSION})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "qwenvl"}))
    try:
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        log.warning("there will be no traces, a variable OTEL_... is wrong: %s", error)
        return Traces()
    log.info("traces go to the collector that %s names", endpoint)
    return Traces(provider)


def _parts(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """The request's stages, and after them the backend's, which follow one another."""
    yield from record.intervals
    if record.timings is None or record.submitted is None:
        return
    timings, began = record.timings, record.submitted
    for name, seconds in (
        ("preprocess", timings.preprocess),
        ("slot", timings.queue),
        ("prefill", timings.prefill),
        ("decode", timings.decode),
    ):
        yield name, began, began + seconds
        began += seconds


def _attributes(
    record: RequestRecord, method: str, route: str, status: int
) -> Iterator[tuple[str, AttributeValue]]:
    """By OpenTelemetry's semantic conventions, as far as those have a name."""
    yield "http.request.method", method
    yield "http.route", route
    yield "http.response.status_code", status
    if usage := record.usage:
        yield "gen_ai.usage.input_tokens", usage.prompt_tokens
        yield "gen_ai.usage.output_tokens", usage.completion_tokens
        yield "qwenvl.cached_tokens", usage.cached_tokens
    if record.finish_reason:
        yield "gen_ai.response.finish_reasons", [str(record.finish_reason)]
    if record.reason:
        yield "error.type", record.reason
    if record.key:
        yield "qwenvl.key", record.key
