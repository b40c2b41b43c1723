"""What an upstream does wrong, and what the client is told: fixed sentences, none of its words."""

from __future__ import annotations

import math
from typing import NamedTuple

from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProtocolError

from qwenvl_app.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    ServiceError,
    TooLarge,
    Unavailable,
)

_RETRY_S = 5  # where it names no time
_LONGEST_RETRY_S = 60
_BUSY = (429, 503)
_LATE = (408, 504)
_OPERATOR = (401, 403, 404, 405)  # a key or a route: nothing that a client could mend


class Rejected(BadRequest):
    """The upstream takes no such request."""

    reason = "upstream_rejected"

    def __init__(self) -> None:
        super().__init__(
            "模型服务不接受这个请求：请检查参数、图片和对话。",
            "The model server does not take this request: check the parameters, pictures and "
            "messages.",
        )


class UpstreamError(Exception):
    """One attempt came to nothing. ``said`` is for the log, and has no word of the upstream's.

    ``error`` is what the client gets if it was the last one. ``retry``: another upstream may do
    better. ``faulty``: this one is to be left out for a while. ``busy_s``: for how long it asks
    to be left alone; None if it does not. ``reset``: the connection broke off before an answer.
    """

    def __init__(
        self,
        said: str,
        error: ServiceError,
        *,
        retry: bool = True,
        faulty: bool = True,
        busy_s: float | None = None,
        reset: bool = False,
    ):
        super().__init__(said)
        self.error, self.retry, self.faulty = error, retry, faulty
        self.busy_s, self.reset = busy_s, reset


class Head(NamedTuple):
    """Status and headers of interest."""

    status: int
    retry_after: str | None


def down() -> ServiceError:
    """No upstream can be reached."""
    return Unavailable(
        "模型服务暂时不可用，请稍后重试。", retry_after=_RETRY_S, reason="upstream_down"
    )


def failed() -> ServiceError:
    """It broke off, or what it says is not what it should."""
    return InternalError("模型服务出错，请稍后重试。", reason="upstream_failed")


def broken(said: str) -> UpstreamError:
    """An answer that is none, or not all of one."""
    return UpstreamError(said, failed())


def of_transport(error: Exception) -> UpstreamError:
    """What urllib3, http.client or the socket raised. The class is told, never its text."""
    said = type(error).__name__
    if isinstance(error, NewConnectionError | ConnectTimeoutError):
        return UpstreamError(said, down())
    return UpstreamError(said, failed(), reset=isinstance(error, ProtocolError))


TRANSPORT = (HTTPError, OSError, ValueError)  # ValueError: http.client's, of a broken chunk


def of_status(head: Head) -> UpstreamError:
    """Any status but 200."""
    status, said = head.status, f"status {head.status}"
    if status in _BUSY:
        wait = _seconds(head.retry_after)
        busy = Unavailable("服务器繁忙，请稍后重试。", retry_after=wait, reason="upstream_busy")
        return UpstreamError(said, busy, faulty=False, busy_s=wait)
    if status in _LATE:
        return UpstreamError(said, DeadlineExceeded(), retry=False, faulty=False)
    if status == 413:
        return UpstreamError(
            said, TooLarge("请求超过模型服务的大小限制。"), retry=False, faulty=False
        )
    if status in _OPERATOR:
        refused = InternalError(
            "模型服务不接受本服务的访问，请联系管理员。", reason="upstream_denied"
        )
        return UpstreamError(said, refused)
    if 400 <= status < 500:
        return UpstreamError(said, Rejected(), retry=False, faulty=False)
    return UpstreamError(said, failed())


def in_stream(code: object) -> UpstreamError:
    """An error that came as an event, after the status: of its fields only the code is looked at.

    vLLM and SGLang tell an HTTP status there, this service and OpenAI a word.
    """
    if isinstance(code, str) and code.isdecimal() and len(code) == 3:
        code = int(code)
    if isinstance(code, int) and not isinstance(code, bool) and 400 <= code <= 599:
        return of_status(Head(code, None))
    if code == "deadline":
        return of_status(Head(504, None))
    if code in ("memory", "busy", "draining", "queue_full", "queue_timeout"):
        return of_status(Head(503, None))
    return broken("an error in the stream")


def _seconds(text: str | None) -> int:
    """Retry-After (RFC 9110, 10.2.3), bounded; a date counts as none."""
    try:
        value = float(text or "")
    except ValueError:
        return _RETRY_S
    return min(max(1, math.ceil(value)), _LONGEST_RETRY_S) if math.isfinite(value) else _RETRY_S
