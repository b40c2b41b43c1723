"""API keys where they are judged: as soon as a head is there, before any of its body is kept."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.e2e.server import FAKE, Server
from tests.framing import CHUNKED, form, get, length
from tests.wire import GOOD, Answer, receive, send

KEY = b"Authorization: Bearer first-key"
ORIGIN = b"Origin: https://a.example"
LARGE = 2**21  # bytes that an upload may have; twice that all that are on their way
PREFLIGHT = (ORIGIN, b"Access-Control-Request-Method: POST")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("guarded") / "log",
        FAKE,
        QWENVL_API_KEYS="first-key,second-key",
        QWENVL_MAX_UPLOAD_MB="2",
        QWENVL_UPLOAD_BUFFER_MB="4",
    )
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 10)


def answer_to(server: Server, sent: bytes) -> Answer:
    """The answer to what is not all of a request."""
    with connect(server) as connection:
        connection.sendall(sent)
        answer = receive(connection)
        assert answer is not None
        return answer


def test_uploads_without_a_key_take_no_room(guarded: Server):
    """26 of 20 MB filled the buffer for a minute, and who had a key got 503."""
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect(guarded)) for _ in range(26)]
        for connection in waiting:
            connection.sendall(form(length(LARGE), ORIGIN, body=bytes(LARGE - 2**18)))
        with connect(guarded) as connection:
            connection.sendall(form(KEY, length(len(GOOD))))
            answer = receive(connection)
        assert answer is not None
        assert answer.status == 200
        for connection in waiting:
            refused = receive(connection)
            assert refused is not None
            assert refused.status == 401
            assert json.loads(refused.body) == {"detail": "缺少有效的 API 密钥。"}
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["access-control-allow-origin"] == "*"
            assert refused.headers["x-request-id"]
            assert refused.headers["connection"] == "close"


@pytest.mark.parametrize(
    "head",
    [
        form(length(LARGE), b"Expect: 100-continue", body=b""),
        form(CHUNKED, b"Expect: 100-continue", body=b""),
        form(CHUNKED, body=b"5\r\nhel"),
        form(length(LARGE), b"Authorization: Bearer first-ke", body=b""),
        form(length(LARGE), KEY, KEY, body=b""),  # WSGI makes one of them, which is no key
        form(length(LARGE), b"Authorization: Basic first-key", body=b"x"),
        get(length(LARGE), line=b"POST /nope HTTP/1.1"),
        get(length(LARGE), line=b"OPTIONS /v1/image/recognize HTTP/1.1"),
    ],
)
def test_without_a_key_no_body_is_asked_or_waited_for(guarded: Server, head: bytes):
    """The first answer is 401, and not 100."""
    assert answer_to(guarded, head).status == 401


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (get(length(LARGE), line=b"GET /livez HTTP/1.1"), 200),
        (get(length(LARGE), line=b"POST /livez HTTP/1.1"), 405),
        (get(CHUNKED, line=b"GET /metrics HTTP/1.1"), 200),
        (get(*PREFLIGHT, length(LARGE), line=b"OPTIONS /v1/image/recognize HTTP/1.1"), 204),
        (get(*PREFLIGHT, line=b"OPTIONS /v1/image/recognize HTTP/1.1"), 204),
        (form(KEY, length(LARGE), body=b"").replace(b"Host: x\r\n", b""), 400),
        (form(KEY, length(LARGE + 1), body=b""), 413),
    ],
)
def test_what_is_open_stays_open_and_waits_for_no_body(guarded: Server, head: bytes, status: int):
    """Or else the buffer would be filled by way of /livez."""
    assert answer_to(guarded, head).status == status


@pytest.mark.parametrize("framing", [length(len(GOOD)), CHUNKED])
def test_with_a_key_100_is_sent_and_the_body_awaited(guarded: Server, framing: bytes):
    body = GOOD if framing != CHUNKED else b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
    with connect(guarded) as connection:
        head = form(framing, b"Authorization: bearer second-key", b"Expect: 100-continue", body=b"")
        connection.sendall(head)
        first = receive(connection)
        assert first is not None
        assert first.status == 100
        for start in range(0, len(body), 100):
            connection.sendall(body[start : start + 100])
        answer = receive(connection)
        assert answer is not None
        assert answer.status == 200


def test_a_client_that_sent_all_may_ask_again(guarded: Server):
    """Nothing is saved by closing its connection."""
    with connect(guarded) as connection:
        for headers, status in (((), 401), ((KEY,), 200)):
            connection.sendall(form(*headers, length(len(GOOD))))
            answer = receive(connection)
            assert answer is not None
            assert answer.status == status


def test_a_client_that_sends_all_before_it_reads_gets_its_401(guarded: Server):
    with connect(guarded) as connection:
        connection.sendall(form(length(LARGE), body=b""))
        time.sleep(0.2)
        connection.sendall(bytes(LARGE))
        answer = receive(connection)
        assert answer is not None
        assert answer.status == 401


def test_a_refusal_at_the_head_is_logged_and_counted_as_any(guarded: Server):
    answer_to(guarded, form(length(LARGE), b"X-Request-ID: at-the-head", body=b""))
    lines = [line for line in guarded.log.read_text().splitlines() if "at-the-head" in line]
    assert len(lines) == 1
    assert "status=401" in lines[0]
    samples = send(guarded.port, "GET", "/metrics").body.decode()
    assert 'http_requests_total{route="/v1/image/recognize",status="401"}' in samples
