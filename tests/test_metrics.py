from __future__ import annotations

import threading

import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from qwenvl_app import create_app, errors
from qwenvl_app.errors import ClientGone, DeadlineExceeded, InternalError, ServiceError, Unavailable
from qwenvl_app.generation import (
    BackendStats,
    Delta,
    FinishReason,
    GenerationRequest,
    Phase,
    Status,
    Timings,
    Usage,
    question,
)
from qwenvl_app.loading.load import load
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.metrics import LATE, REASONS, Metrics
from qwenvl_app.service.record import RequestRecord
from qwenvl_app.settings import Settings
from qwenvl_app.testing import ScriptedBackend
from tests.engines import running
from tests.waiting import until
from tests.wire import END, GOOD, IMAGE, MULTIPART, PNG, PROMPT, ROUTE, part

Samples = dict[str, float]


def parse(text: str) -> Samples:
    """Every sample as ``name{label="value",...}``, in the form in which it is written."""
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in samples, f"{name} is there twice"
            samples[name] = sample.value
    return samples


def scrape(client: FlaskClient) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return parse(response.text)


def test_a_known_mix_is_counted_exactly(client: FlaskClient, backend: ScriptedBackend):
    """Each request once in the HTTP counter and, if it was for the model, once in an outcome."""

    def ask(body: bytes, expected: int) -> None:
        assert client.post(ROUTE, data=body, content_type=MULTIPART).status_code == expected

    for _ in range(3):
        ask(GOOD, 200)
    ask(IMAGE + END, 422)
    ask(part("image", PNG, "a", "text/plain") + PROMPT + END, 400)
    ask(part("image", b"no picture", "a", "image/png") + PROMPT + END, 400)
    ask(b"x" * (21 * 2**20), 413)
    for failure, status in (
        (DeadlineExceeded(), 504),
        (ClientGone(), 499),
        (Unavailable.exhausted(), 503),
        (InternalError("x"), 500),
        (RuntimeError("x"), 500),
    ):
        backend.failure = failure
        ask(GOOD, status)
    backend.failure = None
    backend.phase = Status(Phase.LOADING)
    ask(GOOD, 503)
    backend.phase = Status(Phase.FAILED)
    ask(GOOD, 500)
    backend.phase = Status(Phase.READY)
    client.get("/nope")
    client.get("/also/nope?x=1")
    client.get(ROUTE)
    client.get("/livez")

    samples = scrape(client)
    counted = {
        name.removeprefix("qwenvl_"): value
        for name, value in samples.items()
        if value and name.startswith(("qwenvl_http_", "qwenvl_request_")) and "_total" in name
    }
    assert counted == {
        f'http_requests_total{{route="{ROUTE}",status="200"}}': 3,
        f'http_requests_total{{route="{ROUTE}",status="422"}}': 1,
        f'http_requests_total{{route="{ROUTE}",status="400"}}': 2,
        f'http_requests_total{{route="{ROUTE}",status="413"}}': 1,
        f'http_requests_total{{route="{ROUTE}",status="504"}}': 1,
        f'http_requests_total{{route="{ROUTE}",status="499"}}': 1,
        f'http_requests_total{{route="{ROUTE}",status="503"}}': 2,
        f'http_requests_total{{route="{ROUTE}",status="500"}}': 3,
        'http_requests_total{route="unmatched",status="404"}': 2,
        'http_requests_total{route="unmatched",status="405"}': 1,
        'http_requests_total{route="/livez",status="200"}': 1,
        'request_success_total{finished_reason="stop"}': 3,
        'request_rejected_total{reason="invalid_form"}': 1,
        'request_rejected_total{reason="bad_request"}': 2,
        'request_rejected_total{reason="too_large"}': 1,
        'request_rejected_total{reason="loading"}': 1,
        'request_cancelled_total{reason="deadline"}': 1,
        'request_cancelled_total{reason="client_gone"}': 1,
        'request_failed_total{reason="internal"}': 2,
        'request_failed_total{reason="model_failed"}': 1,
        'request_failed_total{reason="memory"}': 1,
    }
    assert samples["qwenvl_prompt_tokens_total"] == 30
    assert samples["qwenvl_generation_tokens_total"] == 9
    assert samples["qwenvl_e2e_request_latency_seconds_count"] == 3
    assert samples["qwenvl_image_pixels_count"] == 8  # those that came as far as a picture
    assert samples["qwenvl_image_pixels_sum"] == 8 * 64 * 64


def test_histograms_of_one_answer():
    """Each stage is the sum of what the request's thread and the backend measured of it."""
    metrics = Metrics(Admission(4, 16, 30), lambda: Status(Phase.READY), BackendStats)
    stages = [("queue", 100.0, 100.25), ("image", 100.25, 100.75)]
    record = RequestRecord(arrived=100.0, intervals=stages, submitted=101.0)
    timings = Timings(preprocess=0.25, queue=0.5, prefill=2.0, first_token=3.0, decode=8.0)
    record.add(Delta("", FinishReason.LENGTH, Usage(100, 5), timings))
    metrics.count(record, "/x", 200, generates=True)
    samples = parse(metrics.render().decode())
    for name, expected in {
        "request_queue_time_seconds": 0.75,
        "request_preprocess_seconds": 0.75,
        "request_prefill_time_seconds": 2.0,
        "request_decode_time_seconds": 8.0,
        "time_to_first_token_seconds": 4.0,
        "time_per_output_token_seconds": 2.0,
    }.items():
        assert samples[f"qwenvl_{name}_sum"] == expected
        assert samples[f"qwenvl_{name}_count"] == 1
    assert samples['qwenvl_request_success_total{finished_reason="length"}'] == 1


def test_the_state_is_that_of_the_moment(app: Flask, client: FlaskClient, backend: ScriptedBackend):
    """One request runs: it holds a permit and is not counted before its end."""
    backend.go.clear()
    thread = threading.Thread(
        target=lambda: app.test_client().post(ROUTE, data=GOOD, content_type=MULTIPART)
    )
    thread.start()
    until(lambda: backend.generations)
    samples = scrape(client)
    assert samples["qwenvl_num_requests_running"] == 1
    assert samples["qwenvl_num_requests_waiting"] == 0
    assert samples['qwenvl_request_success_total{finished_reason="stop"}'] == 0
    backend.go.set()
    thread.join()
    samples = scrape(client)
    assert samples["qwenvl_num_requests_running"] == 0
    assert samples['qwenvl_request_success_total{finished_reason="stop"}'] == 1


@pytest.mark.parametrize("phase", Phase)
def test_the_phase_and_its_age(client: FlaskClient, backend: ScriptedBackend, phase: Phase):
    backend.phase = Status(phase, since=Status(phase).since - 100)
    samples = scrape(client)
    for each in Phase:
        assert samples[f'qwenvl_phase{{phase="{each}"}}'] == (each is phase)
    assert 100 <= samples["qwenvl_phase_age_seconds"] < 110


def test_two_applications_do_not_share_a_counter(settings: Settings):
    first, second = (create_app(settings, ScriptedBackend()).test_client() for _ in range(2))
    first.get("/livez")
    name = 'qwenvl_http_requests_total{route="/livez",status="200"}'
    assert scrape(first)[name] == 1
    assert name not in scrape(second)


def test_labels_are_bounded(client: FlaskClient):
    """Nothing that a client chooses becomes a label: a thousand paths, one series."""
    before = len(scrape(client))
    for number in range(200):
        client.get(f"/path/{number}")
        client.open("/livez", method=f"VERB{number}")
    assert len(scrape(client)) <= before + 3


def test_memory_of_the_process_is_there(client: FlaskClient):
    assert scrape(client)["process_resident_memory_bytes"] > 10_000_000


def test_every_reason_is_known_from_the_start(client: FlaskClient):
    """An alert's rate needs a series that was 0 once; so every error's word is in the list."""
    samples = scrape(client)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, ServiceError):
            assert REASONS[kind.reason] == kind.status or kind is ServiceError
    zeros = [name for name in samples if 'reason="' in name]
    assert len(zeros) == len(REASONS) + len(LATE) + len(FinishReason) - 1


def test_a_streamed_answer_is_counted_at_its_end(app: Flask, client: FlaskClient):
    @app.get("/stream")
    def stream():  # type: ignore[no-untyped-def]
        return (piece for piece in ("a", "b"))

    name = 'qwenvl_http_requests_total{route="/stream",status="200"}'
    response = client.get("/stream", buffered=False)
    assert name not in scrape(app.test_client())
    assert response.data == b"ab"
    response.close()
    assert scrape(app.test_client())[name] == 1


def test_the_engine_tells_its_state():
    """Rows, tokens and bytes while a sequence runs; the caches' counters after it."""
    with running(load("demo"), prefix_cache_bytes=2**24) as engine:
        idle = engine.stats()
        assert (idle.running, idle.waiting, idle.kv_tokens) == (0, 0, 0)
        image = Image.new("RGB", (64, 64), "white")
        for _ in range(2):
            deltas = list(engine.submit(GenerationRequest(question(image, "what shape?"), "x")))
        stats = engine.stats()
    assert deltas[-1].finish_reason
    assert (stats.prefix_queries, stats.prefix_hits) == (2, 1)
    assert stats.slots >= 1
    assert stats.steps > 2
    assert 0 < stats.prefix_bytes <= stats.prefix_budget_bytes
    assert stats.kv_budget_bytes // stats.kv_budget_tokens > 0
    assert stats.gpu_memory == {}
