"""What the worker's loop holds all clients to."""

from __future__ import annotations

from dataclasses import dataclass

from gunicorn.config import Config

from qwenvl_app.settings import Settings


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    connections: int
    body: int
    unread: int  # of all requests that no thread has taken
    head_s: float  # from the connection on, and again from the first byte on
    body_s: float  # from the head on
    request_s: float  # from the first byte to the answer
    idle_s: float  # from an answer to the connection's next request

    @classmethod
    def of(cls, settings: Settings, cfg: Config) -> Limits:
        """Those of the settings and, where gunicorn has an option for it, of ``cfg``."""
        return cls(
            connections=cfg.worker_connections,
            body=settings.max_upload_mb * 2**20,
            # One upload of the largest kind fits in any case.
            unread=max(settings.upload_buffer_mb, 2 * settings.max_upload_mb) * 2**20,
            head_s=settings.header_timeout_s,
            body_s=settings.body_timeout_s,
            request_s=settings.request_timeout_s,
            idle_s=cfg.keepalive,
        )
