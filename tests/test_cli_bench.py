"""``qwenvl bench``, against ours and against a server that only has OpenAI's route."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

from tests.commands import invoke
from tests.e2e.scripted_app import SLOTS
from tests.e2e.server import Server

TOKENS = len("图 (1,)：what is it?")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("scripted") / "log"
    settings = {"QWENVL_MAX_CONCURRENCY": "1", "QWENVL_MAX_WAITING": "2", "FAKE_SECONDS": "0.01"}
    with Server(log, "tests.e2e.scripted_app:app", **settings) as server:
        server.wait()
        yield server


@pytest.mark.parametrize("route", ["recognize", "chat"])
def test_a_table_of_one_client_and_as_many_as_there_are_slots(scripted: Server, route: str):
    done = invoke("bench", scripted.url, "-n", "6", "--side", "8", "--route", route)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = (line.split() for line in done.stdout.splitlines())
    assert head[:5] == ["clients", "answered", "errors", "requests/s", "tokens/s"]
    assert [row[:3] for row in rows] == [["1", "6", "0"], [str(SLOTS), "6", "0"]]
    for row in rows:
        figures = [float(cell) for cell in row[3:]]
        assert min(figures) > 0
        assert figures[2] <= figures[3] <= figures[4]


def test_as_json(scripted: Server):
    arguments = ("bench", scripted.url, "-n", "4", "--side", "8", "--clients", "2", "--json")
    done = invoke(*arguments)
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert (told["url"], told["route"], told["requests"]) == (scripted.url, "recognize", 4)
    (run,) = told["runs"]
    assert (run["clients"], run["answered"], run["errors"]) == (2, 4, {})
    assert run["seconds"] >= 0.04  # one is answered at a time
    assert run["requests_per_s"] == pytest.approx(4 / run["seconds"], rel=0.02)
    assert run["tokens_per_s"] > run["requests_per_s"] * TOKENS  # a picture's number is longer
    assert 10 <= run["ttft_p50_ms"] <= run["ttft_p95_ms"] <= run["ttft_p99_ms"]


def test_errors_are_counted_and_not_asked_again(scripted: Server):
    """One is answered and two may wait, of eight."""
    arguments = ("bench", scripted.url, "-n", "8", "--side", "8", "--clients", "8", "--json")
    done = invoke(*arguments)
    assert done.returncode == 1
    (run,) = json.loads(done.stdout)["runs"]
    assert run["errors"]["503"] + run["answered"] == 8


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("http://127.0.0.1:1",), 1, "http://127.0.0.1:1: connection refused"),
        (("localhost:8000",), 2, "localhost:8000 is no URL such as"),
    ],
)
def test_an_error_is_one_line(arguments: tuple[str, ...], status: int, said: str):
    done = invoke("bench", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"qwenvl: {said}")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def other() -> Iterator[str]:
    """A server that knows its model by name alone, and counts no tokens."""
    app = Flask("other")

    @app.get("/v1/models")
    def models() -> Response:
        return jsonify(object="list", data=[{"id": "their/model"}])

    @app.post("/v1/chat/completions")
    def chat() -> Response | tuple[Response, int]:
        asked = request.get_json()
        if asked["model"] != "their/model":
            return jsonify(error={"message": "no such model"}), 404
        assert asked["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;")
        chunk = {"choices": [{"delta": {"content": "text"}, "finish_reason": None}]}
        body = f"data: {json.dumps(chunk)}\r\n\r\n" * 3 + "data: [DONE]\r\n\r\n"
        return Response(body, mimetype="text/event-stream")

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_another_server(other: str):
    done = invoke("bench", other, "--route", "chat", "-n", "4", "--side", "8")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "4"]
    assert [row[4] for row in rows] == ["-", "-"]
    wrong = invoke("bench", other, "--route", "chat", "--model", "x")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == f"qwenvl: {other.removesuffix('/v1')}: 404: no such model\n"
