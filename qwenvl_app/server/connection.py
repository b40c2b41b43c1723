"""A client's connection, as the worker's loop (``reception.py``) and its threads share it."""

from __future__ import annotations

import socket
from collections.abc import Generator
from typing import Any

from gunicorn.config import Config
from gunicorn.workers.gthread import TConn

from qwenvl_app.server.framing import Incoming


class Connection(TConn):  # type: ignore[misc]
    """A client, and the request that it is sending."""

    def __init__(self, cfg: Config, sock: socket.socket, client: Any, server: Any):
        super().__init__(cfg, sock, client, server)
        self.initialized = True  # the reception makes a new parser for every request
        self.incoming: Incoming
        self.buffered = 0  # bytes in there, as the reception has counted them
        self.arrived = self.since = 0.0  # monotonic: first byte of the request; in this state since
        self.deadline = 0.0
        self.whole = False  # the request that a thread has: it is all there
        self.has_body = False  # and not only a head
        self.is_head = False  # and the answer is to have no body
        self.pieces: Generator[bytes, None, None]  # of the request that a thread has
        self.kept = False  # it has had an answer already
        self.lingering: int | None = None  # bytes still to be thrown away; None: not closing yet
