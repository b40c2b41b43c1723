"""Stopping: whoever was accepted gets an answer."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.server import FAKE, Server
from tests.framing import form, get, length
from tests.wire import GOOD, exchange, post, receive, send

STOPPING = {"detail": "服务正在停止，请稍后重试。"}
REQUEST = form(b"Connection: close", length(len(GOOD)))


def ask(port: int, answers: list[int | str]) -> None:
    """Post until nobody listens; what was connected has to be answered."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), 10)
        except OSError:  # not accepted
            return
        with connection:
            try:
                connection.sendall(REQUEST)
                answer = receive(connection)
                answers.append(answer.status if answer else "closed")
            except (OSError, AssertionError) as error:
                answers.append(repr(error))


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))]
)
def test_under_load(tmp_path: Path, number: int):
    """Every client that could connect is answered in full or with 503, and the end comes soon."""
    answers: list[int | str] = []
    with Server(tmp_path / "log", FAKE, FAKE_SECONDS="0.3") as server:
        server.wait()
        clients = [threading.Thread(target=ask, args=(server.port, answers)) for _ in range(12)]
        with socket.create_connection(("127.0.0.1", server.port), 10) as upload:
            upload.sendall(REQUEST[:-10])
            for client in clients:
                client.start()
            time.sleep(0.4 + random.Random(number).random() / 2)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            answer = receive(upload)
            assert answer is not None
            assert (answer.status, json.loads(answer.body)) == (503, STOPPING)
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 10
    for client in clients:
        client.join()
    assert 200 in answers
    assert set(answers) <= {200, 503}
    assert "Traceback" not in server.log.read_text()


def test_what_is_said_meanwhile(tmp_path: Path):
    with Server(tmp_path / "log", FAKE, FAKE_SECONDS="3") as server:
        server.wait()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(post, server.port, GOOD)
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            ready = send(server.port, "GET", "/readyz")
            assert (ready.status, json.loads(ready.body)["phase"]) == (503, "draining")
            assert exchange(server.port, get()).headers["connection"] == "close"
            assert send(server.port, "GET", "/livez").status == 200
            refused = post(server.port, GOOD)
            assert (refused.status, json.loads(refused.body)) == (503, STOPPING)
            assert running.result().status == 200
        assert server.process.wait(5) == 0


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_it_at_once(tmp_path: Path, number: signal.Signals):
    """gunicorn ignores a second SIGTERM, and would wait for the running request."""
    with Server(tmp_path / "log", FAKE, FAKE_SECONDS="30") as server:
        server.wait()
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(REQUEST)
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert server.process.poll() is None
            worker = server.worker
            server.process.send_signal(number)
            server.process.wait(5)
        assert not Path(f"/proc/{worker}").exists()


def test_ctrl_c_ends_it_at_once(tmp_path: Path):
    with Server(tmp_path / "log", FAKE, FAKE_SECONDS="30") as server:
        server.wait()
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(REQUEST)
            time.sleep(0.3)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(5) == 0


def test_idle_connections_do_not_keep_it(tmp_path: Path):
    with Server(tmp_path / "log", FAKE) as server:
        server.wait()
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(get())
            assert receive(connection) is not None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 0


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(b"P", marks=pytest.mark.slow),
        REQUEST[: REQUEST.index(b"\r\n\r\n") + 20],
    ],
)
def test_a_request_begun_during_the_stop_does_not_prolong_it(tmp_path: Path, begun: bytes):
    """It had all the time that an upload has, 70 s, and the stop with it."""
    with Server(tmp_path / "log", FAKE) as server:
        server.wait()
        with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
            connection.sendall(get())
            assert receive(connection) is not None
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.4)
            connection.sendall(begun)
            answer = receive(connection)
            assert answer is None or answer.status == 503
            # A moment for the request, and some for the client to read and close.
            assert server.process.wait(9) == 0


def test_a_reload_refuses_nobody(tmp_path: Path):
    """SIGHUP: the old worker finishes what it has, and only the new one accepts."""
    with Server(tmp_path / "log", FAKE, FAKE_SECONDS="1") as server:
        server.wait()
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(post, server.port, GOOD) for _ in range(4)]
            time.sleep(0.5)
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            later = [pool.submit(post, server.port, GOOD) for _ in range(4)]
            assert [future.result().status for future in running + later] == [200] * 8
