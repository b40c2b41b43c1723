"""Traces, with the official packages and a collector on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from qwenvl_app import create_app
from qwenvl_app.generation import Delta, FinishReason, Timings, Usage
from qwenvl_app.service import tracing
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend
from qwenvl_app.version import VERSION
from tests.e2e.server import FAKE, Server
from tests.test_recognize_stream import Told
from tests.wire import GOOD, MULTIPART, ROUTE

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ROOT = Path(__file__).resolve().parent.parent


class Collector:
    """What OpenTelemetry's own collector does with OTLP over HTTP: take it, and say so."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def resources(self) -> list[dict[str, Any]]:
        return [plain(each.resource.attributes) for each in self._spans]

    @property
    def spans(self) -> list[Span]:
        return [span for each in self._spans for scope in each.scope_spans for span in scope.spans]

    @property
    def _spans(self) -> list[Any]:
        return [
            each
            for body in self.bodies
            for each in ExportTraceServiceRequest.FromString(body).resource_spans
        ]


def plain(attributes: Any) -> dict[str, Any]:
    found = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = (
            [item.string_value for item in value.values] if kind == "array_value" else value
        )
    return found


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    for name in [*os.environ]:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv(ENDPOINT, collector.url)
    yield collector
    collector.close()


def application(*deltas: Delta, **settings: Any) -> Flask:
    backend = ScriptedBackend()
    if deltas:
        backend.generate = lambda request: Told(deltas)  # type: ignore[method-assign]
    return create_app(load_settings({}, **settings), backend)


def ask(app: Flask, **headers: str) -> Any:
    return app.test_client().post(ROUTE, data=GOOD, content_type=MULTIPART, headers=headers)


def close(app: Flask) -> None:
    app.extensions["qwenvl"]["close"]()


TIMINGS = Timings(preprocess=0.25, queue=0.5, prefill=1.0, first_token=1.75, decode=2.0)
LAST = Delta("答案", FinishReason.LENGTH, Usage(70, 8, 16), TIMINGS)


def test_a_trace_has_every_stage(collector: Collector, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    app = application(LAST, api_keys="team-a:0123456789")
    before = time.time_ns()
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "Authorization": "Bearer 0123456789"}
    assert ask(app, **sent).status_code == 200
    after = time.time_ns()
    close(app)

    root, *parts = sorted(collector.spans, key=lambda span: span.parent_span_id.hex() != PARENT)
    assert (root.name, root.kind) == (f"POST {ROUTE}", Span.SPAN_KIND_SERVER)
    assert root.parent_span_id.hex() == PARENT
    assert before < root.start_time_unix_nano < root.end_time_unix_nano < after
    assert plain(root.attributes) == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "gen_ai.usage.input_tokens": 70,
        "gen_ai.usage.output_tokens": 8,
        "qwenvl.cached_tokens": 16,
        "gen_ai.response.finish_reasons": ["length"],
        "qwenvl.key": "team-a",
    }
    assert root.status.code == Status.STATUS_CODE_UNSET

    assert {span.trace_id.hex() for span in [root, *parts]} == {TRACE}
    assert {span.parent_span_id for span in parts} == {root.span_id}
    assert all(not span.attributes for span in parts)
    stages = {span.name: span for span in parts}
    assert [*stages] == ["read", "queue", "image", "preprocess", "slot", "prefill", "decode"]
    seconds = {
        name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        for name, span in stages.items()
    }
    assert [round(seconds[name], 6) for name in ("preprocess", "slot", "prefill", "decode")] == [
        *(0.25, 0.5, 1.0, 2.0)
    ]
    ordered = [*stages.values()]
    for one, next_one in pairwise(ordered):
        assert one.end_time_unix_nano <= next_one.start_time_unix_nano + 1000
    assert root.start_time_unix_nano <= ordered[0].start_time_unix_nano

    (line,) = [each for each in caplog.records if each.getMessage() == "request"]
    assert line.fields["trace_id"] == TRACE


def test_what_is_asked_and_answered_is_in_no_trace(collector: Collector):
    app = application(LAST)
    ask(app)
    close(app)
    (body,) = collector.bodies
    for secret in (b"blue shape", "答案".encode(), b"a.png", b"127.0.0.1"):
        assert secret not in body


def test_the_environment_names_the_service(collector: Collector, monkeypatch):
    for name in ("", "answers"):
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        app = application(LAST)
        ask(app)
        close(app)
    assert [each["service.name"] for each in collector.resources] == ["qwenvl", "answers"]
    assert {each["service.version"] for each in collector.resources} == {VERSION}


@pytest.mark.parametrize("sent", ["", "00-0-0-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 4000])
def test_a_caller_without_a_trace(collector: Collector, caplog, sent: str):
    """W3C Trace Context, section 3.2: what is not valid is as if it were not there."""
    caplog.set_level("INFO")
    app = application(LAST)
    ask(app, **({"traceparent": sent} if sent else {}))
    close(app)
    (root,) = [span for span in collector.spans if not span.parent_span_id]
    (line,) = [each for each in caplog.records if each.getMessage() == "request"]
    assert line.fields["trace_id"] == root.trace_id.hex()
    assert len(root.trace_id) == 16


def test_a_caller_who_does_not_sample(collector: Collector, caplog):
    caplog.set_level("INFO")
    app = application(LAST)
    ask(app, traceparent=f"00-{TRACE}-{PARENT}-00")
    close(app)
    assert collector.bodies == []
    assert TRACE in [getattr(each, "fields", {}).get("trace_id") for each in caplog.records]


def test_a_stream_ends_its_trace_when_it_ends(collector: Collector):
    backend = ScriptedBackend("a", "b")
    app = create_app(load_settings({}), backend)
    backend.failure = RuntimeError("no")
    response = ask(app, Accept="text/event-stream")
    assert response.status_code == 200
    assert "error" in response.text
    response.close()
    close(app)
    (root,) = [span for span in collector.spans if not span.parent_span_id]
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert plain(root.attributes)["error.type"] == "internal"


def test_a_refusal_is_a_trace_and_a_probe_is_none(collector: Collector):
    app = application(api_keys="0123456789")
    client = app.test_client()
    assert ask(app).status_code == 401
    for path in ("/livez", "/readyz", "/metrics", "/", "/nowhere"):
        client.get(path)
    close(app)
    (root,) = collector.spans[-1:]
    assert plain(root.attributes)["http.response.status_code"] == 401
    assert {plain(span.attributes).get("http.route", ROUTE) for span in collector.spans} == {ROUTE}


def test_a_collector_that_is_away(collector: Collector, monkeypatch):
    """Neither a request nor the end of the service waits for it for long."""
    collector.close()
    monkeypatch.setattr(tracing, "_LAST_EXPORT_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    app = application(LAST)
    assert ask(app).status_code == 200
    close(app)
    close(app)
    assert "last-traces" in [thread.name for thread in threading.enumerate()], "it was waited for"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (ENDPOINT, ""),
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
    ],
)
def test_where_there_are_none(collector: Collector, monkeypatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    before = threading.active_count()
    app = application(LAST)
    assert threading.active_count() == before
    assert ask(app).status_code == 200
    close(app)
    assert collector.bodies == []


def test_without_the_packages(collector: Collector, monkeypatch, caplog):
    """A line at the start, and a service."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    app = application(LAST)
    assert ask(app).status_code == 200
    close(app)
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert line == (
        "OTEL_EXPORTER_OTLP_ENDPOINT is set, but opentelemetry.sdk.trace is not installed: there "
        "will be no traces; for them, pip install opentelemetry-sdk "
        "opentelemetry-exporter-otlp-proto-http"
    )


def test_a_wrong_value(collector: Collector, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    app = application(LAST)
    assert ask(app).status_code == 200
    close(app)
    assert collector.bodies == []
    assert "there will be no traces, a variable OTEL_... is wrong: max_queue_size" in caplog.text


def test_nothing_is_imported_without_an_endpoint():
    script = """
import sys
from qwenvl_app import create_app
from qwenvl_app.testing import ScriptedBackend
create_app(backend=ScriptedBackend()).test_client().get("/readyz")
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, check=True)


def test_from_a_worker(collector: Collector, tmp_path: Path):
    """gunicorn forks: the exporter's thread is the worker's, and ends with it, all being sent."""
    with Server(tmp_path / "log", FAKE, **{ENDPOINT: collector.url}) as server:
        server.wait()
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "Content-Type": MULTIPART}
        assert requests.post(server.url + ROUTE, GOOD, headers=headers, timeout=30).ok
        assert server.stop() == 0
        assert f"trace_id={TRACE}" in server.log.read_text()
    (root,) = [span for span in collector.spans if span.parent_span_id.hex() == PARENT]
    assert {span.name for span in collector.spans} == {root.name, "read", "queue", "image"}
