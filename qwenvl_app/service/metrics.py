"""Prometheus instruments. Names are those that vLLM and LMDeploy share, where they have one.

One registry an application, never the global one: tests make many applications in one process.
Gauges (queue, batch, caches, phase) are read when somebody scrapes. Counters and histograms are
updated once from each request's record, by ``Metrics.count``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from qwenvl_app import process, sharing
from qwenvl_app.generation import BackendStats, FinishReason, Phase, Status
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.all_workers import AllWorkers
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.version import VERSION

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "qwenvl_"
# Answers take 0.1 to 120 s. Parts of one may be much shorter; time per token is a scale of its own.
ANSWER_S = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120)
PART_S = (0.001, 0.005, 0.01, 0.025, 0.05, *ANSWER_S)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
PIXELS = (1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 8e6, 1.2e7, 2.4e7, 5e7)

HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token", ANSWER_S),
    "time_per_output_token_seconds": ("Between tokens, mean of an answer", TOKEN_S),
    "e2e_request_latency_seconds": ("From arrival to the answer's end", ANSWER_S),
    "request_queue_time_seconds": ("Waiting for a permit, then for a slot", PART_S),
    "request_preprocess_seconds": ("Decoding the picture, making the inputs", PART_S),
    "request_prefill_time_seconds": ("From the slot to the first token", PART_S),
    "request_decode_time_seconds": ("From the first token to the last", PART_S),
    "image_pixels": ("Pixels of a decoded picture", PIXELS),
}

# Why a request got no answer, and the status it got; all words that ``ServiceError.reason`` may be.
UNREAD = "unread"  # the route of requests that the worker itself refuses
REASONS = {
    "bad_request": 400,
    "unauthorized": 401,
    "model_not_found": 404,
    "key_limit": 429,
    "too_large": 413,
    "invalid_form": 422,
    "busy": 503,
    "queue_full": 503,
    "queue_timeout": 503,
    "loading": 503,
    "draining": 503,
    "memory": 503,
    "client_gone": 499,
    "deadline": 504,
    "model_failed": 500,
    "no_answer": 500,
    "internal": 500,
    "upstream_rejected": 400,
    "upstream_busy": 503,
    "upstream_down": 503,
    "upstream_denied": 500,
    "upstream_failed": 500,
}
# Of those that are 503, what may also come after work had begun.
LATE = ("memory", "draining", "upstream_busy", "upstream_down")

process.omit_created_series()


class Metrics:
    """The instruments of one application. All methods may be called on any thread.

    ``status`` and ``stats`` are the backend's; ``admission`` knows who runs and who waits.
    """

    def __init__(
        self,
        admission: Admission,
        status: Callable[[], Status],
        stats: Callable[[], BackendStats],
    ):
        self.registry = CollectorRegistry()
        self._http = self._counter("http_requests", "HTTP requests answered", "route", "status")
        self._success = self._counter("request_success", "Answers given", "finished_reason")
        self._rejected = self._counter("request_rejected", "Refused before work", "reason")
        self._cancelled = self._counter("request_cancelled", "Given up on the way", "reason")
        self._failed = self._counter("request_failed", "Failed in here", "reason")
        self._prompt = self._counter("prompt_tokens", "Tokens read, the pictures' included")
        self._generated = self._counter("generation_tokens", "Tokens written")
        self._by_key = self._counter("key_requests", "Requests with each API key", "key", "status")
        self._prompt_by_key = self._counter("key_prompt_tokens", "Tokens read for each key", "key")
        self._generated_by_key = self._counter(
            "key_generation_tokens", "Tokens written for each key", "key"
        )
        self._histograms = {
            name: Histogram(PREFIX + name, f"{text}.", registry=self.registry, buckets=buckets)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        for finish in FinishReason:
            if finish is not FinishReason.CANCELLED:
                self._success.labels(finish)
        for reason, status_code in REASONS.items():  # a rate needs a series that was once 0
            self._of_failure(status_code).labels(reason)
        for reason in LATE:
            self._failed.labels(reason)
        gauges, directory = _Gauges(admission, status, stats), sharing.directory()
        self._all = AllWorkers(gauges, PREFIX, directory) if directory else None
        if not self._all:
            self.registry.register(gauges)
            ProcessCollector(registry=self.registry)

    def count(self, record: RequestRecord, route: str, status: int, *, generates: bool) -> None:
        """Count one request, of a route that ``generates`` answers or of another. Once each.

        ``route`` is a rule of the application's, never what a client sent.
        """
        self._http.labels(route, str(status)).inc()
        if not generates:
            return
        if record.key:
            self._by_key.labels(record.key, str(status)).inc()
        if record.pixels is not None:
            self._observe("image_pixels", record.pixels)
        cancelled = record.finish_reason is FinishReason.CANCELLED
        if status < 400 and not record.reason and not cancelled:
            self._answered(record)
        else:
            reason = record.reason or FinishReason.CANCELLED
            status = REASONS.get(reason, status)  # a stream that failed had begun with 200
            self._of_failure(status, begun=record.submitted is not None).labels(reason).inc()

    def refuse(self, status: int, reason: str) -> None:
        """Count a request that was answered before the application saw it."""
        self._http.labels(UNREAD, str(status)).inc()
        self._of_failure(status).labels(reason).inc()

    def render(self) -> bytes:
        """Everything, of all workers, in Prometheus' text format 0.0.4."""
        registry = self._all.registry if self._all else self.registry
        return prometheus_client.generate_latest(registry)

    def close(self) -> None:
        """End the thread that several workers have. Any number of times."""
        if self._all:
            self._all.close()

    def _answered(self, record: RequestRecord) -> None:
        self._success.labels(record.finish_reason or FinishReason.STOP).inc()
        self._observe("e2e_request_latency_seconds", record.age)
        if usage := record.usage:
            self._prompt.inc(usage.prompt_tokens)
            self._generated.inc(usage.completion_tokens)
            if record.key:
                self._prompt_by_key.labels(record.key).inc(usage.prompt_tokens)
                self._generated_by_key.labels(record.key).inc(usage.completion_tokens)
        if (timings := record.timings) is None:
            return
        stages, decode = record.stages, timings.decode
        self._observe("request_queue_time_seconds", stages.get("queue", 0.0) + timings.queue)
        self._observe("request_preprocess_seconds", stages.get("image", 0.0) + timings.preprocess)
        self._observe("request_prefill_time_seconds", timings.prefill)
        self._observe("request_decode_time_seconds", decode)
        if record.submitted is not None:
            first = record.submitted - record.arrived + timings.first_token
            self._observe("time_to_first_token_seconds", first)
        if usage and usage.completion_tokens > 1:
            self._observe("time_per_output_token_seconds", decode / (usage.completion_tokens - 1))

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _of_failure(self, status: int, *, begun: bool = False) -> Counter:
        if status < 400 or status in (499, 504):
            return self._cancelled
        # A 503 after work had begun is no refusal: memory ran out, or the service was stopped.
        return self._failed if status == 500 or (status == 503 and begun) else self._rejected

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, f"{text}.", labels, registry=self.registry)


class _Gauges(Collector):
    """Gauges that are asked for at the time of a scrape."""

    def __init__(
        self,
        admission: Admission,
        status: Callable[[], Status],
        stats: Callable[[], BackendStats],
    ):
        self._admission, self._status, self._stats = admission, status, stats

    def collect(self) -> Iterator[Metric]:
        """Every gauge and state-held counter, as of now."""
        admission, stats = self._admission, self._stats()
        yield InfoMetricFamily(PREFIX + "build", "What is running.", {"version": VERSION})
        yield _gauge("num_requests_running", "Hold a permit", admission.permits - admission.free)
        yield _gauge("num_requests_waiting", "Wait for a permit", admission.waiting)
        yield _gauge("batch_sequences", "Are decoded together at the moment", stats.running)
        yield _gauge("batch_slots", "May be decoded together", stats.slots)
        yield _gauge("batch_waiting", "Hold a permit and wait for a slot", stats.waiting)
        yield _counter("engine_steps", "Steps of the engine", stats.steps)
        yield _gauge("kv_cache_tokens", "In the KV cache", stats.kv_tokens)
        yield _gauge("kv_cache_budget_tokens", "For which there is room", stats.kv_budget_tokens)
        yield _gauge("kv_cache_bytes", "That the KV cache holds", stats.kv_bytes)
        yield _gauge("kv_cache_budget_bytes", "That it may hold", stats.kv_budget_bytes)
        yield _counter(
            "prefix_cache_queries", "Prompts whose beginning was looked up", stats.prefix_queries
        )
        yield _counter("prefix_cache_hits", "Prompts whose beginning was known", stats.prefix_hits)
        yield _gauge("prefix_cache_bytes", "That earlier prompts hold", stats.prefix_bytes)
        yield _gauge("prefix_cache_budget_bytes", "That they may hold", stats.prefix_budget_bytes)
        yield _gauge("cuda_graphs", "Decode steps that are recorded", stats.cuda_graphs)
        yield _counter(
            "cuda_graph_failures",
            "Recordings that failed or were wrong: steps are eager since",
            stats.cuda_graph_failures,
        )
        gpu = GaugeMetricFamily(
            PREFIX + "gpu_memory_bytes", "Of each GPU that holds the model.", labels=["gpu", "kind"]
        )
        for (index, kind), size in stats.gpu_memory.items():
            gpu.add_metric([str(index), kind], size)
        yield gpu
        status = self._status()
        phases = GaugeMetricFamily(
            PREFIX + "phase", "1 for the phase it is in, else 0.", labels=["phase"]
        )
        for phase in Phase:
            phases.add_metric([phase], float(phase is status.phase))
        yield phases
        yield _gauge("phase_age_seconds", "Since the phase began", status.age)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, f"{text}.", value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, f"{text}.", value=value)
