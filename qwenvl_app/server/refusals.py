"""Answers to requests that never reach the application, rendered as all errors are."""

from __future__ import annotations

import contextlib
import logging
import socket
from dataclasses import dataclass
from http import HTTPStatus

from gunicorn.http import Request
from gunicorn.util import http_date

from qwenvl_app.errors import ServiceError, TooLarge, Unavailable
from qwenvl_app.web.errors import HttpError, render
from qwenvl_app.web.request_id import HEADER, choose

log = logging.getLogger(__name__)


def late() -> ServiceError:
    """Head or body did not arrive in time."""
    return HttpError(408, "请求没有在规定的时间内发送完毕。")


def crowded() -> ServiceError:
    """Too many connections, or too many bytes of unfinished uploads."""
    return Unavailable("正在上传的请求过多，请稍后重试。", retry_after=5)


def too_large(max_body: int) -> ServiceError:
    """A body over the limit of ``max_body`` bytes."""
    return TooLarge(f"上传的内容超过 {max_body // 2**20} MB 的限制。")


@dataclass(frozen=True)
class Notes:
    """What is known of a refused request besides its head, which may be unreadable."""

    why: str  # for the log
    client: str  # address
    is_head: bool  # HEAD is asked for: the answer has a body's length and no body


def send(sock: socket.socket, error: ServiceError, request: Request | None, notes: Notes) -> None:
    """Answer with ``error``; the caller closes the connection. Any thread, never blocks."""
    sent = dict(request.headers).get(HEADER.upper(), "") if request else ""
    request_id = choose(sent)
    fields = {"client": notes.client, "status": error.status, "reason": error.reason}
    log.info("refused: %s", notes.why, extra={"request_id": request_id, "fields": fields})
    status, headers, body = render(error, request_id)
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Server: gunicorn",
        f"Date: {http_date()}",
        "Connection: close",
        f"Content-Length: {len(body)}",
        f"{HEADER}: {request_id}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    data = "\r\n".join([*head, "", ""]).encode("latin-1")
    write(sock, data if notes.is_head else data + body)


def write(sock: socket.socket, data: bytes) -> None:
    """Send a few bytes, which fit into the socket's buffer unless the client never reads."""
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(data)
