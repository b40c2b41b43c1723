"""Answers to requests that never reach the application, rendered as all errors are."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus

from gunicorn.http import Request
from gunicorn.util import http_date

from qwenvl_app.errors import ServiceError, Unavailable
from qwenvl_app.server.connection import Connection
from qwenvl_app.server.framing import Asked
from qwenvl_app.web import proxies
from qwenvl_app.web.errors import HttpError, render
from qwenvl_app.web.request_id import HEADER, choose

log = logging.getLogger(__name__)


def late() -> ServiceError:
    """Head or body did not arrive in time."""
    return HttpError(
        408, "请求没有在规定的时间内发送完毕。", "The request was not sent in the time it has."
    )


def crowded() -> ServiceError:
    """Too many connections, or too many bytes of unfinished uploads."""
    return Unavailable("正在上传的请求过多，请稍后重试。", retry_after=5)


class Refusals:
    """Answers instead of the application. Any thread, never blocks.

    ``count`` is called with each; ``hops`` is how many proxies are trusted to name the client.
    """

    def __init__(self, count: Callable[[ServiceError], None], hops: int):
        self._count, self._hops = count, hops

    def send(
        self,
        conn: Connection,
        error: ServiceError,
        why: str,
        request: Request | None,
        asked: Asked,
    ) -> None:
        """Answer with ``error`` and log ``why``; the caller closes the connection.

        ``request`` is the head, if it can be read.
        """
        self._count(error)  # before it is sent, so that who has the answer finds it counted
        headers = request.headers if request else []
        request_id = choose(dict(headers).get(HEADER.upper(), ""))
        client = proxies.client(conn.client, headers, self._hops)
        fields = {"client": client, "status": error.status, "reason": error.reason}
        log.info("refused: %s", why, extra={"request_id": request_id, "fields": fields})
        status, more, body = render(error, request_id, asked.path)
        head = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "Server: gunicorn",
            f"Date: {http_date()}",
            "Connection: close",
            f"Content-Length: {len(body)}",
            f"{HEADER}: {request_id}",
            *(f"{name}: {value}" for name, value in more.items()),
        ]
        data = "\r\n".join([*head, "", ""]).encode("latin-1")
        write(conn.sock, data if asked.is_head else data + body)


def write(sock: socket.socket, data: bytes) -> None:
    """Send a few bytes, which fit into the socket's buffer unless the client never reads."""
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(data)
