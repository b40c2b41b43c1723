"""Log lines, as text or as JSON, each with the id of the request that it belongs to.

What clients send may come into a line: whatever is not printable is escaped, so that one record
stays one line and no terminal obeys it.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from typing import Any

# Of the request that the thread answers; set and cleared by ``web/request_id.py``.
request_id: ContextVar[str] = ContextVar("request_id", default="-")


def printable(text: str) -> str:
    """``text`` with everything that does not print as itself escaped as Python would."""
    if text.isprintable():  # nearly always, and at the speed of C
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class TextFormatter(logging.Formatter):
    """``time level [request id] logger: message key=value ...``, and a traceback's own lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(request_id)s] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The line without a traceback."""
        record.request_id = _request_id(record)
        line = super().formatMessage(record)
        for name, value in _fields(record).items():
            text = str(value)
            if not text or set(text) & set(' "='):
                text = json.dumps(text, ensure_ascii=False)
            line += f" {name}={text}"
        return printable(line)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """A traceback, whose message may quote what a client sent."""
        return "\n".join(printable(line) for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "request_id": _request_id(record),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)  # ASCII: nothing in it is a control character


def config(log_format: str) -> dict[str, Any]:
    """For ``logging.config.dictConfig``: everything to stderr, in ``log_format``."""
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"level": "INFO", "handlers": ["stderr"]},
        "loggers": {"gunicorn.error": {"level": "INFO", "handlers": [], "propagate": True}},
    }


def _request_id(record: logging.LogRecord) -> str:
    # A streamed answer is logged when its thread may be at another request already.
    return str(getattr(record, "request_id", None) or request_id.get())


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", None) or {}
