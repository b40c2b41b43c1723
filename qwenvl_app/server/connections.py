"""All open connections, which of them the poller watches, and how they end."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from functools import partial

from qwenvl_app.server.connection import SEND_TIMEOUT_S, Connection
from qwenvl_app.server.framing import FramingLimits, Incoming
from qwenvl_app.server.outgoing import UnreadAnswers

log = logging.getLogger(__name__)

# A client that is still sending gets to read its answer first: a socket that is closed with bytes
# unread is reset. For so long, and so many bytes, what it sends is thrown away.
_LINGER_S = 5.0
_LINGER_BYTES = 64 * 2**20
# For what is left of an answer that is complete when a client's time is as good as over.
_LAST_READ_S = 2.0
_DISCARD = 2**18  # bytes at a time
_UNREAD_ANSWERS = 64 * 2**20  # bytes; a stream of 1,024 tokens has 0.2 MB, with top_logprobs 2 MB


class Connections:
    """Used by the loop's thread only."""

    def __init__(self, poller: selectors.BaseSelector, limits: FramingLimits):
        self._poller, self._limits = poller, limits
        self.all: set[Connection] = set()
        self.watched: set[Connection] = set()  # idle, unfinished or lingering: no thread has them
        self.unread = 0  # bytes of all requests that no thread has taken
        self.answers = UnreadAnswers(_UNREAD_ANSWERS)

    def add(self, conn: Connection) -> None:
        """A client has come."""
        self.all.add(conn)
        self.renew(conn)

    def renew(self, conn: Connection) -> None:
        """Expect another request; what there was of this one is gone, or a thread has it."""
        conn.incoming = Incoming(self._limits, conn.client)
        self.count(conn)

    def count(self, conn: Connection) -> None:
        """Note how many bytes of a request are there now."""
        self.unread += len(conn.incoming.buffer) - conn.buffered
        conn.buffered = len(conn.incoming.buffer)

    def watch(
        self,
        conn: Connection,
        ready: Callable[[Connection], None],
        event: int = selectors.EVENT_READ,
    ) -> None:
        """Have ``ready`` called with ``conn`` when it can be read, or written; nothing else."""
        conn.ready = ready
        dispatch = partial(self._dispatch, conn)
        if conn in self.watched:
            self._poller.modify(conn.sock, event, dispatch)
            return
        self.watched.add(conn)
        self._poller.register(conn.sock, event, dispatch)

    def unwatch(self, conn: Connection) -> None:
        """Leave the connection to a thread, or to its end."""
        if conn in self.watched:
            self.watched.remove(conn)
            self._poller.unregister(conn.sock)

    def deliver(self, conn: Connection, latest: float, then: Callable[[Connection], None]) -> None:
        """Send what is left of an answer as its client reads, then call ``then``.

        The client has ``SEND_TIMEOUT_S`` for its next read, and ``latest``, a ``monotonic()``, or
        ``_LAST_READ_S`` if that is later, for all of them; else its connection is closed.
        """
        conn.since, conn.delivered = time.monotonic(), then
        conn.deliver_by = max(latest, conn.since + _LAST_READ_S)
        self._deliver(conn)

    def _deliver(self, conn: Connection) -> None:
        try:
            conn.sock.flush()
        except OSError:
            self.close(conn)
            return
        if conn.sock.unsent:
            conn.expires = min(time.monotonic() + SEND_TIMEOUT_S, conn.deliver_by)
            self.watch(conn, self._deliver, selectors.EVENT_WRITE)
        else:
            conn.delivered(conn)

    def linger(self, conn: Connection) -> None:
        """Close when the client has, or soon."""
        self.renew(conn)
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(conn)
            return
        conn.lingering, conn.since = _LINGER_BYTES, 0.0
        conn.expires = time.monotonic() + _LINGER_S
        self.watch(conn, self._discard)

    def close(self, conn: Connection) -> None:
        """Close now. What a client has not read of its answer is lost."""
        if conn.sock.unsent:
            log.info("a client did not read its answer")
        self.renew(conn)
        self.unwatch(conn)
        self.all.remove(conn)
        conn.close()

    def _dispatch(self, conn: Connection, _sock: socket.socket) -> None:
        if conn in self.watched:  # else closed since the poller saw it
            conn.ready(conn)

    def _discard(self, conn: Connection) -> None:
        try:
            count = len(conn.sock.recv(_DISCARD))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        conn.lingering -= count
        if not count or conn.lingering <= 0:
            self.close(conn)
