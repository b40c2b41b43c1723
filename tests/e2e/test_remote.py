"""The service in front of others, all of them real gunicorns."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.contract import RECORDED, Case
from tests.e2e.server import FAKE, Server
from tests.remote import fronted
from tests.waiting import until
from tests.wire import GOOD, MULTIPART, ROUTE, post, send

CHAT = "/v1/chat/completions"


@contextmanager
def front(tmp_path: Path, *upstreams: Server, **settings: str) -> Iterator[Server]:
    folder = tmp_path / "front"
    folder.mkdir()
    settings = {
        "QWENVL_BACKEND": "remote",
        "QWENVL_REMOTE_URL": ",".join(upstream.url for upstream in upstreams),
        "QWENVL_REMOTE_MODEL": "demo",
        **settings,
    }
    with Server(folder / "log", **settings) as server:
        server.wait(seconds=30)
        yield server
        assert "Traceback" not in server.log.read_text()


def upstream(folder: Path, name: str, **settings: str) -> Server:
    (folder / name).mkdir()
    return Server(folder / name / "log", FAKE, **settings)


def counted(server: Server, name: str) -> float:
    lines = send(server.port, "GET", "/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def leave(server: Server, body: dict[str, object]) -> socket.socket:
    """Send a request and keep the connection, to leave by closing it."""
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), 10)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_who_leaves_and_whose_time_is_up_frees_the_upstream(tmp_path: Path):
    """Seen in the upstream's own metrics, long before it would have answered."""
    running, cancelled = "qwenvl_num_requests_running", "qwenvl_request_cancelled_total"
    with (
        upstream(tmp_path, "one", FAKE_SECONDS="60") as one,
        front(tmp_path, one, QWENVL_REQUEST_TIMEOUT_S="3") as server,
    ):
        for number, stream in enumerate((False, True)):
            asked = {"messages": [{"role": "user", "content": "hello"}], "stream": stream}
            with leave(server, asked):
                until(lambda: counted(one, running) == 1)
            until(lambda: counted(one, running) == 0)
            until(lambda: counted(one, cancelled) == 2 * number + 1)  # noqa: B023  # at once
            until(lambda: counted(server, running) == 0)
            answer = send(server.port, "POST", CHAT, json.dumps(asked).encode(), "application/json")
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (504, "deadline")
            until(lambda: counted(one, cancelled) == 2 * number + 2)  # noqa: B023
        assert server.stop() == 0


@pytest.mark.slow
def test_upstreams_killed_hung_and_restarted_under_load(tmp_path: Path):
    """Nothing is lost that another could answer, and what comes back is used again."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(upstream(tmp_path, name, FAKE_SECONDS="0.02"))
            for name in ("one", "two")
        ]
        for each in servers:
            each.wait()
        server = stack.enter_context(front(tmp_path, *servers))
        answers: list[int] = []
        stop = threading.Event()

        # Without a picture, whose questions would all go to one of them.
        asked = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()

        def load() -> None:
            while not stop.is_set():
                answers.append(post(server.port, asked, "application/json", CHAT).status)

        def more() -> None:
            """Some answers that were asked for from now on."""
            wanted = len(answers) + 20
            until(lambda: len(answers) >= wanted, 40, lambda: answers[-20:])

        clients = [threading.Thread(target=load) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            more()
            victim = servers[0]
            for child in (*victim.workers, victim.process.pid):  # one machine is switched off
                os.kill(child, signal.SIGKILL)
            more()
            hung = servers[1].worker
            again = stack.enter_context(_on_port(tmp_path, victim.port))
            again.wait()
            until(lambda: counted(again, "qwenvl_request_success_total") > 0, 40)
            os.kill(hung, signal.SIGSTOP)  # another one neither answers nor refuses
            try:
                more()
            finally:
                os.kill(hung, signal.SIGCONT)
            more()
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert set(answers) == {200}, server.log.read_text()


def _on_port(folder: Path, port: int) -> Server:
    """A server where another one was."""
    (folder / "again").mkdir()
    options = ("--bind", f"127.0.0.1:{port}")
    server = Server(folder / "again" / "log", FAKE, options, FAKE_SECONDS="0.02")
    server.port = port
    return server


def test_connections_are_kept(server: Server):
    """A new one for each request would cost a handshake, and over TLS three."""
    with fronted(server.url) as (app, backend):
        for _ in range(5):
            answer = app.test_client().post(ROUTE, data=GOOD, content_type=MULTIPART)
            assert answer.json == {"status": "success", "result": "circle"}
        (only,) = backend.upstreams.all
        assert only.pool.num_requests >= 5 + 2
        assert only.pool.num_connections <= 2  # one of a probe at the same time


@pytest.fixture(scope="module")
def demo(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In front of the demo model."""
    with front(tmp_path_factory.mktemp("demo"), server) as remote:
        yield remote


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.name)
def test_the_contract_with_the_demo_model_behind_it(demo: Server, case: Case):
    answer = send(demo.port, case.method, case.path, case.body, case.content_type)
    expected = case.expected.replace("...", "circle")
    assert (answer.status, answer.body.decode()) == (case.status, expected)


def test_answers_and_counts_are_those_of_the_model(demo: Server, server: Server):
    ours, theirs = (post(each.port, GOOD) for each in (demo, server))
    assert ours.body == theirs.body == b'{"status":"success","result":"circle"}'
    for name in ("x-finish-reason", "x-prompt-tokens", "x-completion-tokens"):
        assert ours.headers[name] == theirs.headers[name]


def test_it_starts_in_a_fraction_of_the_time_and_memory(demo: Server, server: Server):
    """No torch is mapped into the process."""
    maps = [Path(f"/proc/{each.worker}/maps").read_text() for each in (demo, server)]
    assert ["libtorch" in text for text in maps] == [False, True]
