"""The documented route for who asks for events, and what headers say of an answer in one piece."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from qwenvl_app import create_app
from qwenvl_app.errors import DeadlineExceeded, InternalError, Unavailable
from qwenvl_app.generation import Delta, FinishReason, Phase, Status, Usage
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend, ScriptedGeneration
from tests.waiting import until
from tests.wire import END, GOOD, IMAGE, MULTIPART, PROMPT, ROUTE, part

EVENTS = "text/event-stream"
ANSWER = '{"status":"success","result":"这是一个答案。"}'.encode()


def ask(client, accept: str | None = EVENTS, body: bytes = GOOD, **options):
    headers = {} if accept is None else {"Accept": accept}
    return client.post(ROUTE, data=body, content_type=MULTIPART, headers=headers, **options)


def events(response) -> list[tuple[str, dict]]:
    """Names and data; the name of an event without one is "message"."""
    *blocks, end = response.text.split("\n\n")
    response.close()
    assert end == ""
    found = []
    for block in blocks:
        *name, data = block.split("\n")
        assert all(line.startswith("event: ") for line in name)
        assert data.startswith("data: ")
        kind = name[0].removeprefix("event: ") if name else "message"
        found.append((kind, json.loads(data.removeprefix("data: "))))
    return found


class Told(ScriptedGeneration):
    """These deltas and nothing else."""

    def __init__(self, deltas: tuple[Delta, ...]):
        super().__init__(ScriptedBackend(), [], None)
        self.deltas = deltas

    def __iter__(self) -> Iterator[Delta]:
        return iter(self.deltas)


def answering(*deltas: Delta) -> FlaskClient:
    """A client of a service whose backend answers so."""
    backend = ScriptedBackend()
    backend.generate = lambda request: Told(deltas)  # type: ignore[method-assign]
    return create_app(load_settings({}), backend).test_client()


def test_a_stream(client, backend: ScriptedBackend):
    response = ask(client)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert "X-Finish-Reason" not in response.headers
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
    }
    whole = {"status": "success", "result": "这是一个答案。", "finish_reason": "stop"}
    assert 'data: {"delta":"这是"}\n\n' in response.text
    assert events(response) == [
        *(("message", {"delta": piece}) for piece in backend.pieces),
        ("message", whole | {"usage": usage}),
    ]
    assert backend.requests[0].stream is True


@pytest.mark.parametrize(
    "accept",
    [
        "text/event-stream",
        "TEXT/Event-Stream",
        "text/event-stream; charset=utf-8",
        "text/event-stream, */*",
        "text/event-stream, application/json;q=0.9",
        "application/json;q=0.1, text/event-stream;q=0.2",
        "text/event-stream;q=0.1",
    ],
)
def test_who_gets_events(client, accept: str):
    response = ask(client, accept)
    assert response.mimetype == EVENTS
    response.close()


@pytest.mark.parametrize(
    "accept",
    [
        None,
        "",
        "*/*",
        "application/json",
        "text/*",
        "text/*, */*;q=0.1",
        "text/html, application/xhtml+xml, */*;q=0.8",
        "application/json, text/event-stream",
        "text/event-stream, application/json",
        "text/event-stream;q=0.5, application/json",
        "text/event-stream;q=0.5, */*",
        "text/event-stream;q=0",
        "text/event-stream;q=0, */*",
        "text/event-streams",
        "image/png",
        "event-stream",
        ";;,,q=",
        "text/event-stream;q=x",
    ],
)
def test_who_gets_json_as_ever(client, backend: ScriptedBackend, accept: str | None):
    response = ask(client, accept)
    assert (response.data, response.mimetype) == (ANSWER, "application/json")
    assert backend.requests[0].stream is False


def test_headers_of_an_answer_in_one_piece(client):
    response = ask(client, None)
    said = {name: value for name, value in response.headers if name.startswith("X-")}
    assert said.pop("X-Request-ID")
    assert said == {
        "X-Finish-Reason": "stop",
        "X-Prompt-Tokens": "10",
        "X-Completion-Tokens": "3",
        "X-Cached-Tokens": "0",
        "X-Reasoning-Tokens": "0",
    }


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.REPETITION])
def test_an_answer_that_was_cut_says_so(caplog, reason: FinishReason):
    caplog.set_level(logging.INFO)
    deltas = Delta("half an"), Delta(" ans", reason, Usage(9, 4, cached_tokens=8))
    client = answering(*deltas)
    whole = ask(client, None)
    assert whole.json == {"status": "success", "result": "half an ans"}
    assert (whole.headers["X-Finish-Reason"], whole.headers["X-Cached-Tokens"]) == (reason, "8")
    _, last = events(ask(client))[-1]
    assert (last["result"], last["finish_reason"]) == ("half an ans", reason)
    lines = [record.fields for record in caplog.records if record.name == "qwenvl_app.access"]
    assert [line["finish_reason"] for line in lines] == [reason, reason]
    assert [line["tokens"] for line in lines] == [4, 4]


def test_a_backend_that_counts_nothing():
    client = answering(Delta("yes"))
    whole = ask(client, None)
    assert not {"X-Finish-Reason", "X-Prompt-Tokens"} & {*whole.headers.keys()}
    _, last = events(ask(client))[-1]
    assert last == {"status": "success", "result": "yes", "finish_reason": None, "usage": None}


def test_an_answer_without_a_word():
    end = Delta("", FinishReason.STOP, Usage(9, 1))
    client = answering(end)
    ((kind, last),) = events(ask(client))
    assert (kind, last["result"], last["finish_reason"]) == ("message", "", "stop")


def test_reasoning_is_not_streamed_and_nothing_else_is_an_error():
    """The status waits for the answer's first piece, so that its lack can be one."""
    thought = Delta("", reasoning="so"), Delta("", reasoning=" then")
    end = Delta("", FinishReason.LENGTH, Usage(9, 2, reasoning_tokens=2))
    client = answering(*thought, Delta("red"), end)
    assert events(ask(client))[0] == ("message", {"delta": "red"})
    client = answering(*thought, end)
    response = ask(client)
    assert (response.status_code, response.mimetype) == (500, "application/json")
    assert "模型的思考没有得出答案" in response.json["detail"]


@pytest.mark.parametrize(
    ("accept", "body", "status"),
    [
        (EVENTS, IMAGE + END, 422),
        (EVENTS, IMAGE + PROMPT + part("seed", b"x") + END, 422),
        (EVENTS, part("image", b"no picture", "a.png", "image/png") + PROMPT + END, 400),
        (EVENTS, IMAGE + part("prompt", b"x" * 50_001) + END, 413),
    ],
)
def test_an_error_before_the_first_piece_has_its_status(client, app, accept, body, status):
    response = ask(client, accept, body)
    assert (response.status_code, response.mimetype) == (status, "application/json")
    assert list(response.json) == ["detail"]
    assert response.data == ask(client, None, body).data


@pytest.mark.parametrize(
    ("failure", "status", "detail"),
    [
        (Unavailable.exhausted(), 503, "显存或内存不足，请稍后重试或缩小图片。"),
        (InternalError("推理时发生错误。"), 500, "服务器内部错误: 推理时发生错误。"),
        (DeadlineExceeded(), 504, "请求处理超时，请稍后重试。"),
        (KeyError("secret"), 500, "服务器内部错误: 处理请求时发生意外错误，请稍后重试。"),
    ],
)
def test_a_failure_of_the_engine(client, app, backend, caplog, failure, status, detail):
    """Before the first piece and after it."""
    caplog.set_level(logging.INFO)
    backend.failure, pieces, backend.pieces = failure, backend.pieces, []
    early = ask(client)
    assert early.status_code == status
    assert early.json["detail"].startswith(detail)
    backend.pieces = pieces
    late = ask(client)
    *deltas, (kind, error) = events(late)
    assert (late.status_code, len(deltas), kind) == (200, 3, "error")
    assert list(error) == ["detail"]
    assert error["detail"].startswith(detail)
    if status == 500:
        assert error["detail"].endswith(f"（请求编号 {late.headers['X-Request-ID']}）")
    assert "secret" not in late.text
    lines = [record.fields for record in caplog.records if record.name == "qwenvl_app.access"]
    assert [line["status"] for line in lines] == [status, 200]
    assert lines[0]["reason"] == lines[1]["reason"]
    samples = client.get("/metrics").text.splitlines()
    assert not [line for line in samples if "request_success_total{" in line and " 1.0" in line]


def test_not_ready_and_busy(client, backend: ScriptedBackend):
    backend.phase = Status(Phase.LOADING)
    response = ask(client)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "10")
    assert response.json == {"detail": "模型正在加载，请稍后重试。"}


def test_the_deadline_before_the_first_piece(client, backend: ScriptedBackend):
    backend.go.clear()
    response = ask(client, environ_overrides={"qwenvl.arrived": time.monotonic() - 119.9})
    assert (response.status_code, response.json) == (504, {"detail": "请求处理超时，请稍后重试。"})


def test_a_client_that_leaves_between_two_pieces(app, backend: ScriptedBackend, caplog):
    """A generator that is not run to its end releases nothing: the close of the response does."""
    caplog.set_level(logging.INFO)
    admission = app.extensions["qwenvl"]["admission"]
    theirs, ours = socket.socketpair()
    with ours:
        environ = {"gunicorn.socket": ours}
        response = ask(app.test_client(), buffered=False, environ_overrides=environ)
        next(iter(response.response))
        assert (admission.free, backend.generations[0].cancelled) == (admission.permits - 1, 0)
        theirs.close()
        until(lambda: backend.generations[0].cancelled)
        response.close()
        response.close()
    assert admission.free == admission.permits
    assert app.extensions["qwenvl"]["disconnects"].watched == 0


def test_a_stream_that_nobody_reads_gives_everything_back(app, backend: ScriptedBackend):
    response = ask(app.test_client(), buffered=False)
    admission = app.extensions["qwenvl"]["admission"]
    assert admission.free == admission.permits - 1
    response.close()
    assert admission.free == admission.permits
    assert backend.generations[0].cancelled


def test_a_stream_is_counted_and_logged_once_at_its_end(client, caplog):
    caplog.set_level(logging.INFO)
    events(ask(client))
    (line,) = [record.fields for record in caplog.records if record.name == "qwenvl_app.access"]
    assert (line["status"], line["finish_reason"]) == (200, "stop")
    assert (line["prompt_tokens"], line["tokens"], line["pixels"]) == (10, 3, 64 * 64)
    samples = client.get("/metrics").text
    assert 'qwenvl_request_success_total{finished_reason="stop"} 1.0' in samples


def test_line_breaks_and_separators_in_an_answer_break_no_event():
    text = "a\n\ndata: b\r\nc\u2028d\x85e\0"
    client = answering(Delta(text))
    assert [data.get("delta") for _, data in events(ask(client))] == [text, None]
