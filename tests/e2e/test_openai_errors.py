"""What the ``openai`` package makes of errors, those of the worker itself too, and of bad lines."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.server import FAKE, Server
from tests.framing import CHUNKED, CODING, HEADERS, LATE, MALFORMED, VERSION, get, length
from tests.waiting import until
from tests.wire import ROUTE, receive

CHAT = "/v1/chat/completions"
KEY = "the-key"
HELLO = [{"role": "user", "content": "hello"}]
LIMITS = {
    "QWENVL_API_KEYS": KEY,
    "QWENVL_MAX_UPLOAD_MB": "1",
    "QWENVL_HEADER_TIMEOUT_S": "0.5",
    "QWENVL_BODY_TIMEOUT_S": "0.5",
    "QWENVL_MAX_CONCURRENCY": "1",
    "QWENVL_MAX_WAITING": "0",
}


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No answer comes while this file is there."""
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, hold: Path) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("errors") / "log"
    with Server(log, FAKE, FAKE_HOLD=str(hold), **LIMITS) as server:
        server.wait()
        yield server


def client(port: int, **options) -> openai.OpenAI:
    asked = {"api_key": KEY, "max_retries": 0, "timeout": 20} | options
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", **asked)


def ask(asking: openai.OpenAI, messages=HELLO) -> str | None:
    return asking.chat.completions.create(model="x", messages=messages).choices[0].message.content


# A request's method, and what follows its path; status and words of the answer, in both forms.
BROKEN = {
    "a head that stops": ("GET", b"1.1\r\nHost: x\r\nA:", 408, LATE, "not sent in the time"),
    "a body that stops": (
        "POST",
        b"1.1\r\nHost: x\r\nAuthorization: Bearer the-key\r\n" + length(9) + b"\r\n\r\nx",
        408,
        LATE,
        "not sent in the time",
    ),
    "a bad chunk": (
        "POST",
        b"1.1\r\nHost: x\r\nAuthorization: Bearer the-key\r\n" + CHUNKED + b"\r\n\r\nzz\r\n",
        400,
        MALFORMED,
        "no valid HTTP",
    ),
    "a chunk too large": (
        "POST",
        b"1.1\r\nHost: x\r\nAuthorization: Bearer the-key\r\n" + CHUNKED + b"\r\n\r\n40000000\r\n",
        413,
        "上传的内容超过 1 MB 的限制。",
        "larger than the limit",
    ),
    "no host": ("GET", b"1.1\r\n\r\n", 400, MALFORMED, "no valid HTTP"),
    "no key": ("GET", b"1.1\r\nHost: x\r\n\r\n", 401, "缺少有效的 API 密钥。", "API key"),
    "too many headers": ("GET", b"1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431, HEADERS, "headers"),
    "a coding": (
        "POST",
        b"1.1\r\nHost: x\r\nTransfer-Encoding: foo\r\n\r\n",
        501,
        CODING,
        "Transfer-Encoding",
    ),
    "a version": ("GET", b"2.0\r\nHost: x\r\n\r\n", 505, VERSION, "version of HTTP"),
}


@pytest.mark.parametrize("path", [CHAT, "http://x/v1/models?a=b", ROUTE])
@pytest.mark.parametrize("name", BROKEN)
def test_the_workers_own_errors_have_the_shape_of_their_path(guarded: Server, name: str, path: str):
    method, rest, status, chinese, english = BROKEN[name]
    with socket.create_connection(("127.0.0.1", guarded.port), 10) as connection:
        connection.sendall(f"{method} {path} HTTP/".encode() + rest)
        answer = receive(connection)
    assert answer is not None
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    if path == ROUTE:
        assert answer.body == f'{{"detail":"{chinese}"}}'.encode()
        return
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert english in error["message"]
    assert error["message"].isascii()
    kinds = {401: "authentication_error", 501: "server_error", 505: "server_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")


def test_a_path_that_is_not_known_has_the_documented_shape(guarded: Server):
    """The path may go on after what has come."""
    with socket.create_connection(("127.0.0.1", guarded.port), 10) as connection:
        connection.sendall(b"GET /v1/models")
        answer = receive(connection)
    assert answer is not None
    assert (answer.status, json.loads(answer.body)) == (408, {"detail": LATE})


def test_the_package_raises_the_class_of_the_status(guarded: Server):
    with client(guarded.port, api_key="other") as asking:
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(asking)
        assert caught.value.code == "unauthorized"
        with pytest.raises(openai.AuthenticationError):  # before any of the body is read
            ask(asking, [{"role": "user", "content": "x" * 2**19}])
        with pytest.raises(openai.AuthenticationError):
            asking.models.list()
    with client(guarded.port) as asking:
        with pytest.raises(openai.APIStatusError) as large:
            ask(asking, [{"role": "user", "content": "x" * 2**21}])
        assert (large.value.status_code, large.value.code) == (413, "too_large")
        assert large.value.request_id
        assert ask(asking) == "一个答案。"


def test_busy_is_tried_again_when_retry_after_says(guarded: Server, hold: Path):
    def refused() -> bool:
        return "status=503" in guarded.log.read_text()

    hold.touch()
    try:
        with client(guarded.port, max_retries=10) as asking, ThreadPoolExecutor(2) as pool:
            both = [pool.submit(ask, asking) for _ in range(2)]
            until(refused, said=guarded.log.read_text)
            hold.unlink()
            assert [each.result() for each in both] == ["一个答案。"] * 2
            hold.touch()
            first = pool.submit(ask, asking)
            with client(guarded.port) as impatient:
                until(lambda: "running 1.0" in _metrics(guarded), said=lambda: _metrics(guarded))
                with pytest.raises(openai.InternalServerError) as busy:
                    ask(impatient)
            assert (busy.value.status_code, busy.value.code) == (503, "queue_full")
            assert int(busy.value.response.headers["Retry-After"]) >= 1
            hold.unlink()
            assert first.result()
    finally:
        hold.unlink(missing_ok=True)


def _metrics(server: Server) -> str:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(get(line=b"GET /metrics HTTP/1.1"))
        answer = receive(connection)
    assert answer is not None
    return answer.body.decode()


def stall(connection: socket.socket, port: int) -> None:
    """Keep back most of the request, and bring the answer to what came."""
    head, end, _ = connection.recv(65536).partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port), 10) as server:
        server.sendall(head + end)
        while data := server.recv(65536):
            connection.sendall(data)
    connection.close()


def reset(connection: socket.socket, _: int) -> None:
    """End the connection as a host that went down and came up again does."""
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes, and then the end."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def bad_line(port: int, spoil: Callable[[socket.socket, int], None]) -> Iterator[int]:
    """A port that leads to ``port``; the first connection gets ``spoil`` and the second is good."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            spoil(connection, port)
            connection, _ = listener.accept()
            with connection, socket.create_connection(("127.0.0.1", port), 10) as server:
                back = threading.Thread(target=pump, args=(server, connection))
                back.start()
                pump(connection, server)
                back.join()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(20)


@pytest.mark.parametrize(
    ("spoil", "raised"), [(stall, openai.APIStatusError), (reset, openai.APIConnectionError)]
)
def test_what_the_network_spoils_is_tried_again(guarded: Server, spoil, raised):
    with bad_line(guarded.port, spoil) as port:
        with client(port) as once, pytest.raises(raised) as caught:
            ask(once)
        if spoil is stall:
            assert (caught.value.status_code, caught.value.code) == (408, "bad_request")
        with client(port) as asking:  # the line is good now; or it would hang
            assert ask(asking) == "一个答案。"
    with bad_line(guarded.port, spoil) as port, client(port, max_retries=1) as asking:
        assert ask(asking) == "一个答案。"
