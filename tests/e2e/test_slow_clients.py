"""Clients that dawdle, hold on or come in crowds take nothing from the others."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.server import FAKE, Server
from tests.framing import CHUNKED, form, get, length
from tests.waiting import until
from tests.wire import GOOD, exchange, post, receive, send


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


class Crowd(threading.Thread):
    """Keeps 64 connections of each kind open: silent, a header byte every 2 s, a body byte."""

    HEAD = get(b"Content-Type: text/plain", length(1000), line=b"POST /livez HTTP/1.1")

    def __init__(self, port: int):
        super().__init__()
        self.port, self.ended = port, threading.Event()

    def run(self) -> None:
        kinds = ["silent", "head", "body"] * 64
        connections: list[socket.socket | None] = [None] * len(kinds)
        sent = [0] * len(kinds)
        while not self.ended.wait(2):
            for number, kind in enumerate(kinds):
                try:
                    if (connection := connections[number]) is None:
                        connection = connections[number] = connect(self.port)
                        connection.setblocking(False)
                        sent[number] = 0
                        connection.send(self.HEAD if kind == "body" else b"")
                    elif kind != "silent":
                        connection.send(self.HEAD[sent[number] : sent[number] + 1])
                        sent[number] += 1
                    if connection.recv(1000) in (b"",):
                        raise ConnectionResetError
                except BlockingIOError:
                    pass
                except OSError:  # it was sent away: a new one takes its place
                    if connection := connections[number]:
                        connection.close()
                    connections[number] = None
        for connection in connections:
            if connection:
                connection.close()


def settle(server: Server, handles: int, threads: int) -> None:
    """Wait until the worker has no more handles and threads than it had."""

    def settled() -> bool:
        now = server.taken()
        return now[0] <= handles and now[1] <= threads

    until(settled, said=lambda: (server.taken(), handles, threads))


@pytest.mark.slow
def test_192_slow_connections(tmp_path: Path):
    """gthread had a thread waiting for each of them, and four were enough to stop the service."""
    with Server(tmp_path / "log", FAKE, QWENVL_HEADER_TIMEOUT_S="5") as server:
        server.wait()
        with ThreadPoolExecutor(40) as pool:  # all threads that there can be are there
            list(pool.map(lambda _: post(server.port, GOOD), range(200)))
        time.sleep(1)
        before = server.taken()
        crowd = Crowd(server.port)
        crowd.start()
        try:
            end = time.monotonic() + 11  # beyond the limit for a head, so that some are sent away
            while time.monotonic() < end:
                assert exchange(server.port, get(b"Connection: close"), timeout=1).status == 200
                assert post(server.port, GOOD).status == 200
                time.sleep(0.2)
            assert server.taken()[0] >= before[0] + 150
        finally:
            crowd.ended.set()
            crowd.join()
        settle(server, *before)
    assert "Traceback" not in server.log.read_text()


def test_the_application_is_told_when_a_request_began(fake: Server):
    """On one connection: the second request's age is its own."""
    ages = []
    with connect(fake.port) as connection:
        for seconds in (1.0, 0.0):
            connection.sendall(get(length(5), line=b"POST /age HTTP/1.1"))
            time.sleep(seconds)
            connection.sendall(b"hello")
            answer = receive(connection)
            assert answer is not None
            ages.append(json.loads(answer.body)["age"])
    assert ages[0] > 0.9  # it began when the first bytes were seen
    assert ages[1] < 0.9


def test_100_clients_at_once_leave_threads_for_health_checks(tmp_path: Path):
    with Server(tmp_path / "log", FAKE, FAKE_SECONDS="0.3") as server:
        server.wait()
        with ThreadPoolExecutor(100) as pool:
            posts = [pool.submit(post, server.port, GOOD) for _ in range(300)]
            while not all(future.done() for future in posts):
                for path in ("/livez", "/readyz"):
                    assert send(server.port, "GET", path).status == 200
                time.sleep(0.05)
        counts = Counter(future.result().status for future in posts)
        assert set(counts) == {200, 503}
        assert all("retry-after" in f.result().headers for f in posts if f.result().status == 503)


def test_a_full_house_drops_the_longest_unfinished(tmp_path: Path):
    with Server(tmp_path / "log", FAKE, QWENVL_MAX_CONNECTIONS="10") as server:
        server.wait()
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(connect(server.port)) for _ in range(9)]
            begun = stack.enter_context(connect(server.port))
            begun.sendall(get()[:10])
            for _ in range(3):
                assert post(server.port, GOOD).status == 200
            assert silent[0].recv(1) == b""
            more = [stack.enter_context(connect(server.port)) for _ in range(12)]
            answer = receive(begun)
            assert answer is not None
            assert answer.status == 503
            assert answer.headers["retry-after"]
            assert post(server.port, GOOD).status == 200
            assert more[0].recv(1) == b""


def test_unfinished_uploads_have_a_bound_together(tmp_path: Path):
    limits = {"QWENVL_MAX_UPLOAD_MB": "2", "QWENVL_UPLOAD_BUFFER_MB": "4"}
    with Server(tmp_path / "log", FAKE, **limits) as server:
        server.wait()
        with contextlib.ExitStack() as stack:
            uploads, size = [], 2**21 - 1
            for sent in (2**17, 7 * 2**18, 7 * 2**18, 7 * 2**18):
                uploads.append((stack.enter_context(connect(server.port)), size - sent))
                uploads[-1][0].sendall(form(length(size), body=bytes(sent)))
                time.sleep(0.3)
            # The second had to give way for the fourth: of those that are as large it is the
            # oldest, and the first, older still, holds little.
            answer = receive(uploads.pop(1)[0])
            assert answer is not None
            assert answer.status == 503
            assert answer.headers["retry-after"]
            for connection, missing in reversed(uploads):
                connection.sendall(bytes(missing))
                answer = receive(connection)
                assert answer is not None
                assert answer.status == 400
        assert post(server.port, GOOD).status == 200  # and what they held is free again
        with connect(server.port) as connection:
            connection.sendall(form(length(2**21 - 1), body=bytes(2**21 - 1)))
            answer = receive(connection)
            assert answer is not None
            assert answer.status == 400


def test_clients_that_never_read_take_no_threads(fake: Server):
    """They ask again and again on one connection, until no answer fits into its buffers."""
    asking = get() * 20_000
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            connection = stack.enter_context(connect(fake.port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(asking)
        for _ in range(30):
            assert exchange(fake.port, get(b"Connection: close"), timeout=1).status == 200
            time.sleep(0.1)
        assert post(fake.port, GOOD).status == 200


def test_bodies_that_nobody_read_are_let_go(fake: Server):
    """An idle connection kept its last request's parser, and with it 20 MB of body."""
    body = bytes(19 * 2**20)
    head = get(length(len(body)), line=b"POST /livez HTTP/1.1")
    status = Path(f"/proc/{fake.worker}/statm")
    before = int(status.read_text().split()[1]) * 4096
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(connect(fake.port))
            connection.sendall(head + body)
            answer = receive(connection)
            assert answer is not None
            assert answer.status == 405
            connection.sendall(get())  # nor were they in the way of the next request
            answer = receive(connection)
            assert answer is not None
            assert answer.status == 200
        time.sleep(0.5)
        assert int(status.read_text().split()[1]) * 4096 - before < 4 * len(body)


def test_a_flood_of_connections_leaves_the_loop_to_others(fake: Server):
    """Accepting went on for as long as clients came, and the master killed the worker for it."""
    ended = threading.Event()

    def flood(port: int) -> None:
        with selectors.DefaultSelector() as selector:
            while not ended.is_set():
                for _ in range(200):
                    sock = socket.socket()
                    sock.setblocking(False)
                    sock.connect_ex(("127.0.0.1", port))
                    selector.register(sock, selectors.EVENT_WRITE)
                selector.select(0.01)
                for key in list(selector.get_map().values()):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()

    worker = fake.worker
    flooding = threading.Thread(target=flood, args=(fake.port,))
    flooding.start()
    try:
        with connect(fake.port) as connection:
            for _ in range(10):
                connection.sendall(get())
                assert receive(connection) is not None
                time.sleep(0.2)
    finally:
        ended.set()
        flooding.join()
    assert fake.worker == worker
    assert post(fake.port, GOOD).status == 200


def test_what_the_loop_refuses_is_counted_and_logged(tmp_path: Path):
    with Server(tmp_path / "log", FAKE, QWENVL_HEADER_TIMEOUT_S="0.5") as server:
        server.wait()
        for sent, status in ((b"GET / HT", 408), (b"no http\r\n\r\n", 400)):
            with connect(server.port) as connection:
                connection.sendall(sent)
                answer = receive(connection)
                assert answer is not None
                assert answer.status == status
        samples = send(server.port, "GET", "/metrics").body.decode()
    for status in (400, 408):
        assert f'qwenvl_http_requests_total{{route="unread",status="{status}"}} 1.0' in samples
    assert 'qwenvl_request_rejected_total{reason="bad_request"} 2.0' in samples
    assert "refused: too slow client=127.0.0.1 status=408" in server.log.read_text()


def test_the_client_of_a_refusal_is_who_asked_the_proxies(tmp_path: Path):
    """As in the line of an answer; but a head that can't be read says nothing that is believed."""
    limits = {"QWENVL_TRUSTED_HOPS": "1", "QWENVL_BODY_TIMEOUT_S": "0.5"}
    server = Server(tmp_path / "log", FAKE, **limits)
    proxied = (b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-For: 1.2.3.4")
    cases = {
        "too-slow": (form(length(9), *proxied, b"X-Request-ID: too-slow", body=b"x"), 408),
        "chunk": (form(CHUNKED, *proxied, b"X-Request-ID: chunk", body=b"zz\r\n"), 400),
        "no-host": (get(*proxied, b"X-Request-ID: no-host", host=b""), 400),
        "answered": (get(*proxied, b"X-Request-ID: answered"), 200),
        "unreadable": (get(*proxied, b"A : b"), 400),
    }
    try:
        server.wait()
        for sent, status in cases.values():
            with connect(server.port) as connection:
                connection.sendall(sent)
                answer = receive(connection)
                assert answer is not None
                assert answer.status == status
    finally:
        server.stop()
    lines = server.log.read_text().splitlines()
    for name in cases:
        told = [line for line in lines if name in line or "InvalidHeaderName" in line]
        client = "127.0.0.1" if name == "unreadable" else "1.2.3.4"
        assert any(f"client={client} " in line for line in told), (name, told)
