"""gunicorn's log without its line for each request."""

from __future__ import annotations

from gunicorn.glogging import Logger


class Log(Logger):  # type: ignore[misc]
    """Where ``logconfig_dict`` is set, gunicorn collects all that such a line could say."""

    def access(self, *_: object) -> None:
        """Nothing: the application has a line of its own (``web/request_log.py``)."""
