"""Applications that are not ours, for gunicorn with our configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Flask

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

flask = Flask("other")


@flask.post("/")
@flask.get("/")
def home() -> str:
    return "flask"


def plain(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
    environ["wsgi.input"].read()
    start("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"plain"]
