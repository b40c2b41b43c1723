"""What clients have not read: complete for who reads late, and bounded for all together."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gunicorn.config import Config

from qwenvl_app.server.connection import Connection
from qwenvl_app.server.connections import Connections
from qwenvl_app.server.framing import FramingLimits
from qwenvl_app.server.outgoing import Outgoing, UnreadAnswers

ANSWER = bytes(range(256)) * 2**13  # 2 MiB: more than the kernel has room for


class Client(contextlib.ExitStack):
    """A connection: ``mine`` is the service's end."""

    def __init__(self, unread: UnreadAnswers):
        super().__init__()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.other = self.enter_context(socket.create_connection(listener.getsockname(), 10))
            self.mine = self.enter_context(Outgoing(listener.accept()[0], unread))


@pytest.fixture
def unread() -> UnreadAnswers:
    return UnreadAnswers(4 * 2**20)


@pytest.fixture
def client(unread: UnreadAnswers) -> Iterator[Client]:
    with Client(unread) as client:
        yield client


def test_an_answer_waits_for_who_reads_late(client: Client):
    for start in range(0, len(ANSWER), 1000):
        client.mine.sendall(ANSWER[start : start + 1000])
    assert client.mine.unsent
    received = b""
    while len(received) < len(ANSWER):
        client.mine.flush()
        received += client.other.recv(2**16)
    assert received == ANSWER
    assert not client.mine.unsent


def test_who_has_most_unread_is_dropped(client: Client, unread: UnreadAnswers):
    with Client(unread) as greedy:
        client.mine.sendall(ANSWER)
        with pytest.raises(BrokenPipeError):
            for _ in range(5):
                greedy.mine.sendall(ANSWER)
        assert greedy.mine.fileno() >= 0  # or it might be another connection's
        client.mine.flush()
        client.mine.sendall(b"x")


def test_what_is_closed_counts_no_more(client: Client, unread: UnreadAnswers):
    for _ in range(4):
        with Client(unread) as closed:
            closed.mine.sendall(ANSWER)
            closed.mine.close()
            with pytest.raises(ConnectionResetError):  # the kernel's part is given up, too
                while closed.other.recv(2**16):
                    pass
    client.mine.sendall(ANSWER)
    client.mine.sendall(b"x")


def test_a_file_does_not_overtake_what_waits(client: Client, tmp_path: Path):
    """The kernel's sendfile put it before what was unsent, and its thread waited for the client."""
    (tmp_path / "file").write_bytes(b"<" + ANSWER)
    client.mine.setblocking(True)
    client.mine.sendall(ANSWER)
    with (tmp_path / "file").open("rb") as file:
        assert client.mine.sendfile(file, offset=1, count=1000) == 1000
    received = b""
    while len(received) < len(ANSWER) + 1000:
        client.mine.flush()
        received += client.other.recv(2**16)
    assert received == ANSWER + ANSWER[:1000]


def test_an_answer_that_ends_late_can_still_be_read(client: Client):
    """Of one that was complete just before its time was over, the end was lost with a reset."""
    with selectors.DefaultSelector() as poller:
        connections = Connections(poller, FramingLimits(Config(), 2**20))
        conn = Connection(Config(), client.mine, ("", 0), ("", 0))
        connections.add(conn)
        conn.sock.sendall(ANSWER)
        done: list[Connection] = []

        def delivered(conn: Connection) -> None:
            connections.unwatch(conn)
            done.append(conn)

        connections.deliver(conn, time.monotonic() - 1, delivered)
        assert conn.expires > time.monotonic()
        received = b""
        while len(received) < len(ANSWER):
            for key, _ in poller.select(0):
                key.data(key.fileobj)
            received += client.other.recv(2**16)
        assert (received, done) == (ANSWER, [conn])
        connections.close(conn)


def test_a_head_goes_with_what_follows_it(client: Client):
    client.mine.hold()
    client.mine.sendall(b"head ")
    client.other.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.other.recv(1)
    client.mine.sendall(b"first ")
    assert client.other.recv(99) == b"head first "
    client.mine.sendall(b"second")
    assert client.other.recv(99) == b"second"


def test_a_head_that_nothing_follows_is_flushed(client: Client):
    client.mine.hold()
    client.mine.sendall(b"head")
    client.mine.flush()
    assert client.other.recv(99) == b"head"
