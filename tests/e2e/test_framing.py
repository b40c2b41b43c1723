"""Every framing case over a real socket, and the raw requests of gunicorn's own tests."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator

import pytest

from tests.e2e.server import FAKE, Server
from tests.framing import CASES, SMALL_LIMITS, Framing, form, get, length
from tests.wire import GOOD, exchange, post, receive


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits and no model."""
    with Server(tmp_path_factory.mktemp("small") / "log", FAKE, **SMALL_LIMITS) as server:
        server.wait()
        yield server


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_framing(small: Server, case: Framing):
    head_only = case.raw.lstrip().startswith(b"HEAD")
    with socket.create_connection(("127.0.0.1", small.port), 20) as connection:
        connection.sendall(case.raw)
        if case.hang_up:
            connection.shutdown(socket.SHUT_WR)
        answers = []
        for _ in case.statuses:
            answer = receive(connection, head_only=head_only)
            assert answer is not None, "closed"
            answers.append(answer)
        assert tuple(answer.status for answer in answers) == case.statuses
        if not answers or answers[-1].headers["connection"] == "close":
            assert connection.recv(1) == b""
    for answer in answers:
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"]
        assert int(answer.headers["content-length"]) > 0
        assert answer.status < 400 or head_only or json.loads(answer.body)["detail"]
    if case.detail:
        assert json.loads(answers[-1].body) == {"detail": case.detail}


def test_a_client_that_waits_for_100_gets_it_once(small: Server):
    with socket.create_connection(("127.0.0.1", small.port), 20) as connection:
        connection.sendall(form(length(len(GOOD)), b"Expect: 100-continue", body=b""))
        first = receive(connection)
        assert first is not None
        assert first.status == 100
        connection.sendall(GOOD)
        second = receive(connection)
        assert second is not None
        assert second.status == 200


def test_a_client_that_waits_for_100_is_refused_before_it_sends(small: Server):
    with socket.create_connection(("127.0.0.1", small.port), 20) as connection:
        connection.sendall(form(length(10**9), b"Expect: 100-continue", body=b""))
        answer = receive(connection)
        assert answer is not None
        assert answer.status == 413


def test_a_client_that_sends_all_before_it_reads_gets_its_413(small: Server):
    """Closing with bytes unread resets the connection, and 413 would be lost with it."""
    body = bytes(8 * 2**20)
    answer = exchange(small.port, form(length(len(body)), body=body))
    assert answer.status == 413


def test_nothing_of_a_client_in_the_log_unescaped(small: Server):
    for raw in (
        get(line=b"GET /%0d%0aINFO%20forged%1b[2J HTTP/1.1"),
        get(line=b"GET /?private HTTP/1.1"),
        get(b"X-Request-ID: \x1b[2J"),
        get(b"X-Request-ID: forged: id"),
        b"private \x1b[2J\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", small.port), 20) as connection:
            connection.sendall(raw)
            assert receive(connection) is not None
    log = small.log.read_text()
    assert r'path="/\r\nINFO forged\u001b[2J"' in log
    for secret in ("\x1b", "\r", "private", "forged: id", "\nINFO"):
        assert secret not in log


@pytest.fixture(scope="session")
def requests_of_gunicorn(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The raw requests that gunicorn's parser is tested with, from its source package."""
    folder = tmp_path_factory.mktemp("gunicorn-source")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
    command += [":all:", "--dest", str(folder), "gunicorn==27.0.1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    if done.returncode:
        pytest.skip(f"no source package of gunicorn to be had: {done.stderr[-300:]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return [unescape(path.read_bytes()) for path in sorted(folder.rglob("requests/*/*.http"))]


def unescape(text: bytes) -> bytes:
    """As gunicorn's ``tests/treq.py`` does."""
    text = text.replace(b"\n", b"").replace(b"\\r\\n", b"\r\n")
    text = text.replace(b"\\0", b"\0").replace(b"\\n", b"\n").replace(b"\\t", b"\t")
    first, *parts = text.split(b"\\x")
    return first + b"".join(bytes.fromhex(part[:2].decode()) + part[2:] for part in parts)


@pytest.mark.slow  # tests/framing.py has a case of each kind, and needs no package built
def test_the_requests_of_gunicorn(small: Server, requests_of_gunicorn: list[bytes]):
    """None of them is a failure of ours or a hang, and the worker is the same after them."""
    assert len(requests_of_gunicorn) > 130
    worker = small.worker
    for raw in requests_of_gunicorn:
        with socket.create_connection(("127.0.0.1", small.port), 20) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            head_only = raw.lstrip().startswith(b"HEAD")
            while answer := receive(connection, head_only=head_only):
                assert answer.status < 500 or answer.status in (501, 505), raw
    assert small.worker == worker
    assert post(small.port, GOOD).status == 200
