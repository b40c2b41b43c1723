"""A server that is well when it is probed, and does one thing wrong when it is asked."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

SECRET = "sekret-words-of-the-upstream"
MODEL = "demo"
_PATIENCE_S = 20.0  # of a way that hangs; its client is gone long before

Act = Callable[[socket.socket, threading.Event], None]


class Way(NamedTuple):
    """What is sent, and what the client of the service in front gets."""

    act: bytes | Act
    status: int
    reason: str
    retry_after: str | None = None
    elsewhere: bool = True  # whether another upstream is asked


def _status(line: str, *headers: str, body: str = SECRET) -> bytes:
    head = [f"HTTP/1.1 {line}", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


def _stream(*events: object, kind: str = "text/event-stream", more: str = "") -> bytes:
    """An answer that ends with its connection. Bytes are sent as they are."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + b"".join(
        event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
        for event in events
    )


def _said(**delta: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def _chunked(*lines: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(lines)


PIECE = _said(content="half " + SECRET)
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
DONE = b"data: [DONE]\n\n"


def _reset(after: bytes) -> Act:
    def act(connection: socket.socket, _: threading.Event) -> None:
        connection.sendall(after)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return act


def _forever(start: bytes, more: bytes) -> Act:
    """``more`` again and again, until nobody reads it."""

    def act(connection: socket.socket, stop: threading.Event) -> None:
        connection.sendall(start)
        while not stop.wait(0.05):
            connection.sendall(more)

    return act


def _hang(start: bytes = b"") -> Act:
    def act(connection: socket.socket, stop: threading.Event) -> None:
        connection.sendall(start)
        connection.settimeout(_PATIENCE_S)
        connection.recv(1)  # returns when the other side closes

    return act


def once(connection: socket.socket, _: threading.Event) -> None:
    """An answer; the connection is kept, and ends when it is used again."""
    sent = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in (PIECE, END)) + DONE
    connection.sendall(_chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(sent), sent)))
    _read_request(connection)


_RATE = "429 Too Many Requests"
_AWAY = "503 Service Unavailable"
_ONCE = {"elsewhere": False}
WAYS = {
    "400": Way(_status("400 Bad Request"), 400, "upstream_rejected", **_ONCE),
    "422": Way(_status("422 Unprocessable"), 400, "upstream_rejected", **_ONCE),
    "402": Way(_status("402 Payment Required"), 400, "upstream_rejected", **_ONCE),
    "413": Way(_status("413 Too Large"), 413, "too_large", **_ONCE),
    "401": Way(_status("401 Unauthorized"), 500, "upstream_denied"),
    "403": Way(_status("403 Forbidden"), 500, "upstream_denied"),
    "404": Way(_status("404 Not Found"), 500, "upstream_denied"),
    "408": Way(_status("408 Request Timeout"), 504, "deadline", **_ONCE),
    "504": Way(_status("504 Gateway Timeout"), 504, "deadline", **_ONCE),
    "429": Way(_status(_RATE, "Retry-After: 7"), 503, "upstream_busy", "7"),
    "429 without a time": Way(_status(_RATE), 503, "upstream_busy", "5"),
    "503 for an hour": Way(_status(_AWAY, "Retry-After: 3600"), 503, "upstream_busy", "60"),
    "503 with a date": Way(
        _status(_AWAY, "Retry-After: Fri, 27 Nov 2026 22:00:00 GMT"), 503, "upstream_busy", "5"
    ),
    "503 with nonsense": Way(_status(_AWAY, "Retry-After: -inf"), 503, "upstream_busy", "5"),
    "500": Way(_status("500 Internal Server Error"), 500, "upstream_failed"),
    "502 in HTML": Way(
        _status("502 Bad Gateway", body=f"<html>{SECRET}</html>"), 500, "upstream_failed"
    ),
    "599": Way(_status("599 Odd"), 500, "upstream_failed"),
    "a redirect": Way(
        _status("307 Temporary Redirect", f"Location: http://127.0.0.1:1/{SECRET}"),
        500,
        "upstream_failed",
    ),
    "204": Way(b"HTTP/1.1 204 No Content\r\n\r\n", 500, "upstream_failed"),
    "closed without a word": Way(b"", 500, "upstream_failed"),
    "reset without a word": Way(_reset(b""), 500, "upstream_failed"),
    "half a status line": Way(b"HTTP/1.1 20", 500, "upstream_failed"),
    "no HTTP": Way(f"SSH-2.0-{SECRET}\r\n".encode(), 500, "upstream_failed"),
    "half a head": Way(b"HTTP/1.1 200 OK\r\nContent-Ty", 500, "upstream_failed"),
    "1,000 headers": Way(
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n", 500, "upstream_failed"
    ),
    "an endless header": Way(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 200_000, 500, "upstream_failed"),
    "JSON in place of events": Way(
        _stream(b'{"choices":[]}', kind="application/json"), 500, "upstream_failed"
    ),
    "HTML in place of events": Way(
        _stream(f"<p>{SECRET}".encode(), kind="text/html"), 500, "upstream_failed"
    ),
    "no event": Way(_stream(), 500, "upstream_failed"),
    "the end alone": Way(_stream(DONE), 500, "upstream_failed"),
    "half an event": Way(_stream(b'data: {"choices":[{'), 500, "upstream_failed"),
    "no JSON": Way(_stream(f"data: {SECRET}\n\n".encode()), 500, "upstream_failed"),
    "a list": Way(_stream([SECRET]), 500, "upstream_failed"),
    "choices of another kind": Way(_stream({"choices": {"a": 1}}), 500, "upstream_failed"),
    "a choice that is a text": Way(_stream({"choices": [SECRET]}), 500, "upstream_failed"),
    "content that is a number": Way(_stream(_said(content=1)), 500, "upstream_failed"),
    "not UTF-8": Way(
        _stream(b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n'), 500, "upstream_failed"
    ),
    "half a surrogate pair": Way(_stream(_said(content="\ud800")), 500, "upstream_failed"),
    "a nest of 100,000": Way(_stream(b"data: " + b"[" * 100_000 + b"\n\n"), 500, "upstream_failed"),
    "an unknown end": Way(
        _stream({"choices": [{"delta": {}, "finish_reason": SECRET}]}), 500, "upstream_failed"
    ),
    "an end that is a list": Way(
        _stream({"choices": [{"delta": {}, "finish_reason": []}]}, DONE), 500, "upstream_failed"
    ),
    "usage below zero": Way(
        _stream({"choices": [], "usage": {"prompt_tokens": -1}}), 500, "upstream_failed"
    ),
    "a call without a name": Way(
        _stream(_said(tool_calls=[{"index": 0, "function": {}}])), 500, "upstream_failed"
    ),
    "a megabyte after another": Way(_stream(b"data: " + b"x" * 2**23), 500, "upstream_failed"),
    "compressed unasked": Way(
        _stream(b"\x1f\x8b" + SECRET.encode(), more="Content-Encoding: gzip\r\n"),
        500,
        "upstream_failed",
    ),
    "a chunk that is none": Way(_chunked(b"zz\r\n", b"data: \r\n"), 500, "upstream_failed"),
    "half a chunk": Way(_chunked(b"ff\r\n", b"data: {"), 500, "upstream_failed"),
    "an error event before all": Way(
        _stream({"error": {"message": SECRET, "code": 500}}), 500, "upstream_failed"
    ),
    "an error event: busy": Way(
        _stream({"error": {"message": SECRET, "code": 503}}), 503, "upstream_busy", "5"
    ),
    "an error event: a text": Way(_stream({"error": SECRET}), 500, "upstream_failed"),
    "an error event: content": Way(
        _stream({"error": {"message": SECRET, "code": "400"}}), 400, "upstream_rejected", **_ONCE
    ),
    "an error event: late": Way(
        _stream({"error": {"message": SECRET, "code": "deadline"}}), 504, "deadline", **_ONCE
    ),
    "half a stream": Way(_stream(PIECE), 500, "upstream_failed", **_ONCE),
    "half a stream and its mark": Way(_stream(PIECE, DONE), 500, "upstream_failed", **_ONCE),
    "half a stream, reset": Way(_reset(_stream(PIECE)), 500, "upstream_failed", **_ONCE),
    "half a stream, an error": Way(
        _stream(PIECE, {"error": {"message": SECRET}}), 500, "upstream_failed", **_ONCE
    ),
    "never a byte": Way(_hang(), 504, "deadline", **_ONCE),
    "half a head, and no more": Way(_hang(b"HTTP/1.1 200 OK\r\nA"), 504, "deadline", **_ONCE),
    "a head without an end": Way(
        _forever(b"HTTP/1.1 200 OK\r\nA: ", b"b"), 504, "deadline", **_ONCE
    ),
    "no event after the head": Way(_hang(_stream()), 504, "deadline", **_ONCE),
    "comments for ever": Way(_forever(_stream(), b": wait\n\n"), 504, "deadline", **_ONCE),
    "half a stream, and no more": Way(_hang(_stream(PIECE)), 504, "deadline", **_ONCE),
    "an answer for ever": Way(
        _forever(_stream(), _stream(PIECE).partition(b"\r\n\r\n")[2]), 504, "deadline", **_ONCE
    ),
}


class BrokenUpstream:
    """Listens on a free port of 127.0.0.1; as a context it is ended when the block ends.

    ``way``: what it does with the next request. ``asked``: how many it has got. ``well``: what it
    answers to ``/health``.
    """

    def __init__(self, way: bytes | Act = b"") -> None:
        self.way = way
        self.asked = 0
        self.well = "200 OK"
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> BrokenUpstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused. Any number of times."""
        self._stop.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(_PATIENCE_S)
            path = _read_request(connection)
            if path == "/health":
                connection.sendall(_status(self.well, "Connection: close"))
            elif path == "/v1/models":
                body = json.dumps({"data": [{"id": MODEL}]})
                connection.sendall(_status("200 OK", "Connection: close", body=body))
            elif path:
                self.asked += 1
                if callable(self.way):
                    self.way(connection, self._stop)
                else:
                    connection.sendall(self.way)


def _read_request(connection: socket.socket) -> str:
    """The path of one request, all of which was read."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (piece := connection.recv(65536)):
            return ""
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    lengths = [line.split(":")[1] for line in lines if line.startswith("content-length:")]
    missing = int(lengths[0]) - len(body) if lengths else 0
    while missing > 0:
        missing -= len(connection.recv(65536))
    return lines[0].split()[1]
