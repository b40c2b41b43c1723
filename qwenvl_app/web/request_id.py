"""Every answer carries ``X-Request-ID``: the client's if it sent a sane one, else a new one."""

from __future__ import annotations

import re
import uuid

from flask import Flask, Response, g, request

from qwenvl_app import logs

HEADER = "X-Request-ID"
_SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")  # safe in a log line, a header and a sentence


def register(app: Flask) -> None:
    """Install the hooks."""
    app.before_request(_choose)
    app.after_request(_attach)
    app.teardown_request(_forget)


def choose(sent: str) -> str:
    """The id for a request that came with ``sent``, which may be empty."""
    return sent if _SANE.fullmatch(sent) else uuid.uuid4().hex


def _choose() -> None:
    g.request_id = choose(request.headers.get(HEADER, ""))
    logs.request_id.set(g.request_id)


def _attach(response: Response) -> Response:
    response.headers[HEADER] = g.request_id
    return response


def _forget(_error: BaseException | None) -> None:
    logs.request_id.set("-")  # the thread goes on to another request
