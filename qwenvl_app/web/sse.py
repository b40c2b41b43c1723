"""Server-sent events (WHATWG HTML, 9.2), each with one JSON value."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flask import Response

DONE = "data: [DONE]\n\n"  # OpenAI's end of a stream


def event(data: str, name: str = "") -> str:
    """One event. JSON has no line breaks outside its texts, where they are escaped."""
    return (f"event: {name}\n" if name else "") + f"data: {data}\n\n"


def response(events: Iterator[str], close: Callable[[], None]) -> Response:
    """A streamed answer; ``close`` is called when it ends, whether or not it ever began."""
    streamed = Response(events, mimetype="text/event-stream")
    streamed.headers["Cache-Control"] = "no-store"
    streamed.headers["X-Accel-Buffering"] = "no"  # or nginx would keep it until it ends
    streamed.call_on_close(close)
    return streamed
