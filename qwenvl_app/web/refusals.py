"""Answers to requests that never reach the application, in the form of ``errors.py``'s."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from dataclasses import dataclass
from http import HTTPStatus

from gunicorn.http import Request
from gunicorn.http import errors as http
from gunicorn.util import http_date

from qwenvl_app.errors import (
    INTERNAL_PREFIX,
    BadRequest,
    InternalError,
    ServiceError,
    TooLarge,
    Unavailable,
)
from qwenvl_app.web.request_id import HEADER, choose

log = logging.getLogger(__name__)

# What gunicorn's parser raises; of the others that it calls a ParseException, ``malformed`` tells.
_KINDS = {
    http.LimitRequestLine: (414, "请求的网址过长。"),
    http.LimitRequestHeaders: (431, "请求的首部过多或过长。"),
    http.ExpectationFailed: (417, "不支持请求首部 Expect 的内容。"),
    http.UnsupportedTransferCoding: (501, "不支持请求的传输编码。"),
}


class _Refused(ServiceError):
    """A status that only framing has."""

    reason = "bad_request"

    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status = status


def late() -> ServiceError:
    """Head or body did not arrive in time."""
    return _Refused(408, "请求没有在规定的时间内发送完毕。")


def crowded() -> ServiceError:
    """Too many connections, or too many bytes of unfinished uploads."""
    return Unavailable("正在上传的请求过多，请稍后重试。", retry_after=5)


def too_large(max_body: int) -> ServiceError:
    """A body over the limit of ``max_body`` bytes."""
    return TooLarge(f"上传的内容超过 {max_body // 2**20} MB 的限制。")


def malformed() -> ServiceError:
    """What is no HTTP, or not all of it."""
    return BadRequest("请求不符合 HTTP 协议，无法解析。")


def of(error: BaseException) -> ServiceError:
    """What the client is told about an error that gunicorn reports; logged if it is our fault."""
    if isinstance(error, http.InvalidHTTPVersion) and isinstance(error.version, tuple):
        return _Refused(505, "不支持请求的 HTTP 版本。")  # and no other text in its place
    if type(error) in _KINDS:
        return _Refused(*_KINDS[type(error)])
    ours = (http.InvalidResponseHeader, http.InvalidResponseHeaderName)
    if isinstance(error, http.ParseException | http.NoMoreData) and not isinstance(error, ours):
        return malformed()
    log.error("unexpected error", exc_info=error)
    return InternalError("处理请求时发生意外错误，请稍后重试。")


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
    detail = error.detail
    if isinstance(error, InternalError):
        detail = f"{INTERNAL_PREFIX}{detail}（请求编号 {request_id}）"
    body = json.dumps({"detail": detail}, ensure_ascii=False, separators=(",", ":")).encode()
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "Server: gunicorn",
        f"Date: {http_date()}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"{HEADER}: {request_id}",
    ]
    if error.retry_after is not None:
        head.append(f"Retry-After: {error.retry_after}")
    data = "\r\n".join([*head, "", ""]).encode("latin-1")
    write(sock, data if notes.is_head else data + body)


def write(sock: socket.socket, data: bytes) -> None:
    """Send a few bytes, which fit into the socket's buffer unless the client never reads."""
    with contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(data)
