"""Real sockets: who leaves is noticed, who stays is not, and numbers are used again."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenvl_app.service.deadline import Deadline
from qwenvl_app.web.disconnects import Disconnects
from tests.waiting import until


@pytest.fixture
def disconnects() -> Iterator[Disconnects]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    disconnects = Disconnects()
    yield disconnects
    assert disconnects.watched == 0
    disconnects.close()
    disconnects.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return client, server


def deadline() -> Deadline:
    return Deadline(time.monotonic() + 60)


def close(client: socket.socket) -> None:
    client.close()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def close_behind_unread_bytes(client: socket.socket) -> None:
    client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
    client.close()


@pytest.mark.parametrize("pair", [tcp_pair, socket.socketpair])
@pytest.mark.parametrize("leave", [close, reset, close_behind_unread_bytes])
def test_a_client_that_leaves_is_noticed(disconnects: Disconnects, pair, leave):
    client, server = pair()
    with server:
        who, told = deadline(), threading.Event()
        with disconnects.watch(server, who), who.on_leaving(told.set):
            leave(client)
            assert told.wait(5)
        assert who.gone


def test_a_client_that_has_left_before_is_known_before_any_work(disconnects: Disconnects):
    """gthread starts requests whose client has given up while they waited for a thread."""
    client, server = tcp_pair()
    with server:
        client.close()
        time.sleep(0.05)
        who = deadline()
        with disconnects.watch(server, who):
            assert who.gone


def test_a_client_that_sends_more_has_not_left(disconnects: Disconnects):
    """Pipelined bytes make a socket readable; looking at that alone took it for an end."""
    client, server = tcp_pair()
    with client, server:
        who, told = deadline(), threading.Event()
        with disconnects.watch(server, who), who.on_leaving(told.set):
            client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
            assert not told.wait(0.1)
        assert not who.gone


def test_who_leaves_afterwards_is_nobodys_business(disconnects: Disconnects):
    client, server = tcp_pair()
    with server:
        who = deadline()
        with disconnects.watch(server, who):
            pass
        client.close()
        time.sleep(0.05)
        assert not who.gone


def test_no_socket_no_watch(disconnects: Disconnects):
    who = deadline()
    with disconnects.watch(None, who):
        assert disconnects.watched == 0
    client, server = socket.socketpair()
    client.close()
    server.close()
    with disconnects.watch(server, who):
        assert disconnects.watched == 0
    assert not who.gone


def test_a_failing_callback_does_not_blind_the_thread(disconnects: Disconnects, caplog):
    def fail() -> None:
        raise RuntimeError("boom")

    for callback in (fail, None):
        client, server = tcp_pair()
        with server:
            who, told = deadline(), threading.Event()
            with disconnects.watch(server, who), who.on_leaving(callback or told.set):
                client.close()
                if callback is None:
                    assert told.wait(5)
                until(lambda who=who: who.gone)
    assert "boom" in caplog.text


def test_after_the_end_nothing_is_watched(disconnects: Disconnects):
    client, server = tcp_pair()
    with client, server:
        who = deadline()
        with disconnects.watch(server, who):
            disconnects.close()
        with disconnects.watch(server, who):
            assert disconnects.watched == 0


def test_many_at_once_with_the_same_numbers_again_and_again(disconnects: Disconnects):
    """A number that is closed is another connection's at once: nobody may be taken for another."""
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(60):
            client, server = tcp_pair()
            with server:
                who, told = deadline(), threading.Event()
                leaves = (number + turn) % 2 == 0
                with disconnects.watch(server, who), who.on_leaving(told.set):
                    if leaves:
                        client.close()
                        if not told.wait(5):
                            wrong.append("not noticed")
                    elif told.wait(0.001):
                        wrong.append("taken for another")
                client.close()  # a moment before the number is free: its event may still come

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
