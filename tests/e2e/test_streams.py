"""Streams of chat completions: clients that don't read, and many at once."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.e2e.server import FAKE, Server
from tests.waiting import until
from tests.wire import exchange, send

CHAT = "/v1/chat/completions"
PIECES = 2000  # of 1 kB: 2.4 MB as events, which no socket's buffer has room for
TIMEOUT_S = 6
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its answers are made at once, and long."""
    log = tmp_path_factory.mktemp("wordy") / "log"
    settings = {"FAKE_PIECES": str(PIECES), "QWENVL_REQUEST_TIMEOUT_S": str(TIMEOUT_S)}
    with Server(log, FAKE, **settings) as server:
        server.wait()
        yield server
        assert server.stop() == 0
        assert "Traceback" not in log.read_text()


def asking(*, stream: bool = True) -> bytes:
    body = json.dumps(HELLO | {"stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def stalled(port: int) -> socket.socket:
    """A client that asks for a stream and reads no more than its beginning."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    connection.sendall(asking())
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def text_of(events: bytes) -> str:
    assert events.endswith(b"data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in events.split(b"\n\n")[:-2]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def read(server: Server, pause: float = 0.0) -> str:
    """The text of a stream that a client reads, after a while."""
    with requests.post(
        server.url + CHAT, json=HELLO | {"stream": True}, stream=True, timeout=10
    ) as answer:
        time.sleep(pause)
        return text_of(answer.content)


def memory(server: Server) -> int:
    """MiB of the worker."""
    return int(Path(f"/proc/{server.worker}/statm").read_text().split()[1]) // 256


def running(server: Server) -> bool:
    samples = send(server.port, "GET", "/metrics").body.decode()
    return "\nqwenvl_num_requests_running 0.0\n" not in samples


def test_clients_that_do_not_read_hold_their_streams_and_nothing_else(wordy: Server):
    """Each held a thread and a permit, so that four of them kept everybody else out."""
    whole = "".join(f"{number:1000}" for number in range(PIECES))
    assert read(wordy) == whole
    handles, threads = wordy.taken()  # it may have the connection that has just been closed
    before = memory(wordy)
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        silent = [stack.enter_context(stalled(wordy.port)) for _ in range(20)]
        until(lambda: not running(wordy), TIMEOUT_S / 2)  # they have no permits
        for pause in (0, 0.5):
            assert read(wordy, pause) == whole
        assert (
            exchange(
                wordy.port, asking(stream=False).replace(b"Host", b"Connection: close\r\nHost")
            ).status
            == 200
        )
        assert time.monotonic() - began < TIMEOUT_S, "too slow to tell anything"
        assert wordy.taken()[0] >= handles - 1 + len(silent)
        assert memory(wordy) - before < 100
        until(lambda: wordy.taken()[0] <= handles and wordy.taken()[1] <= threads, TIMEOUT_S + 5)
        for connection in silent:
            with pytest.raises(ConnectionResetError):
                while connection.recv(2**16):
                    pass
    assert not running(wordy)
    assert read(wordy) == whole


def test_a_client_that_reads_too_slowly_is_closed_at_its_deadline(wordy: Server):
    """It went on for as long as it read a little every ten seconds."""
    with stalled(wordy.port) as connection:
        end = time.monotonic() + TIMEOUT_S + 5
        with pytest.raises(ConnectionResetError):
            while time.monotonic() < end:
                connection.recv(4096)
                time.sleep(0.2)


def test_a_request_that_was_sent_ahead_waits_for_the_answer_before_it(wordy: Server):
    with stalled(wordy.port) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        time.sleep(0.5)
        received = b""
        while piece := connection.recv(2**16):
            received += piece
    assert received.count(b"data: ") == PIECES + 3
    assert b"data: [DONE]" in received
    assert b"HTTP/1.1 200 OK" in received.partition(b"data: [DONE]")[2]
