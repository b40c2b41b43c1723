"""Request buffering: reads each connection, without blocking, until it holds a whole request.

Everything here runs on the thread of the worker's loop.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable

from gunicorn.config import Config
from gunicorn.http import Request

from qwenvl_app.errors import ServiceError, Unavailable
from qwenvl_app.server import refusals
from qwenvl_app.server.connection import SEND_TIMEOUT_S, Connection
from qwenvl_app.server.connections import Connections
from qwenvl_app.server.framing import FramingLimits, State
from qwenvl_app.server.limits import Limits
from qwenvl_app.server.outgoing import Outgoing
from qwenvl_app.web.errors import malformed, of_http, too_large

# Bytes at a time. Of a body much, since every call may wait for the GIL; of a head less, since what
# belongs to the requests after it is copied with each of them.
_RECEIVE, _RECEIVE_HEAD = 2**20, 2**16
_ACCEPT = 64  # connections at a time
_LAST_WORDS_S = 2.0  # at the end of a stop, for clients that are connected and have not asked yet
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Reception:
    """All connections. A thread gets those whose request is there by ``take``, and none before.

    ``wants_body`` says of a head whether its body is waited for; if not, the application gets the
    head alone, to say so.
    """

    def __init__(
        self,
        cfg: Config,
        limits: Limits,
        poller: selectors.BaseSelector,
        refuser: refusals.Refusals,
        wants_body: Callable[[Request], bool],
    ):
        self._cfg, self._limits, self._refuser = cfg, limits, refuser
        self.connections = Connections(poller, FramingLimits(cfg, limits.body, wants_body))
        self.stopping = False
        self._heads: deque[Connection] = deque()  # requests that wait for a thread
        self._bodies: deque[Connection] = deque()  # the same, those with a body
        self._scratch = memoryview(bytearray(_RECEIVE))

    @property
    def has_room(self) -> bool:
        """Whether one more can be accepted, if need be for one that goes."""
        return bool(self.connections.watched) or not self._is_full

    @property
    def _is_full(self) -> bool:
        return len(self.connections.all) >= self._limits.connections

    @property
    def waiting(self) -> set[Connection]:
        """Those whose request waits for a thread."""
        return {*self._heads, *self._bodies}

    @property
    def unfinished(self) -> set[Connection]:
        """Those of whose request a part is here, and who have read what they were answered."""
        return {c for c in self.connections.watched if c.buffered and not c.sock.unsent}

    def accept(self, listener: socket.socket) -> None:
        """Take connections that are waiting, as long as there is room, and up to a number.

        Then it is the others' turn: a flood of them must not hold the loop.
        """
        for _ in range(_ACCEPT):
            if self._is_full and not self._make_room():
                return
            try:
                sock, client = listener.accept()
            except OSError as error:
                if error.errno in _FULL and self._make_room():
                    continue
                return
            outgoing = Outgoing(sock, self.connections.answers)
            conn = Connection(self._cfg, outgoing, client, listener.getsockname())
            self.connections.add(conn)
            self._await(conn, self._limits.head_s)
            self._receive(conn)

    def _make_room(self) -> bool:
        """Drop the connection that has been unfinished for longest, if any is."""
        if not self.connections.watched:
            return False
        conn = min(self.connections.watched, key=lambda conn: conn.since)
        if conn.buffered:
            self._answer(conn, refusals.crowded(), "no room")
        self.connections.close(conn)
        return True

    def _await(self, conn: Connection, patience: float) -> None:
        """Read the connection's next request, whose first byte is due in ``patience`` seconds."""
        conn.since = time.monotonic()
        conn.expires = conn.since + patience
        self.connections.watch(conn, self._receive)

    def begin_stop(self) -> None:
        """Refuse all requests that are not whole."""
        self.stopping = True
        for conn in self.unfinished:
            self.refuse(conn, Unavailable.stopping(), "stopping")

    def last_orders(self) -> None:
        """Leave connections that wait for a request but a moment."""
        last = time.monotonic() + _LAST_WORDS_S
        for conn in self.connections.watched:
            if not conn.lingering and not conn.sock.unsent:
                conn.expires = min(conn.expires, last)

    def expire(self) -> None:
        """Deal with those whose time is over."""
        now = time.monotonic()
        for conn in [conn for conn in self.connections.watched if conn.expires <= now]:
            if conn.sock.unsent or not conn.buffered:
                self.connections.close(conn)
            elif self.stopping:
                self.refuse(conn, Unavailable.stopping(), "stopping")
            else:
                self.refuse(conn, refusals.late(), "too slow")

    def take(self, *, bodies: bool) -> Connection | None:
        """Give a thread the connection that has waited longest; those without a body go first.

        ``bodies``: also one with a body. None if there is no such connection.
        """
        queue = self._heads or (self._bodies if bodies else None)
        if not queue:
            return None
        conn = queue.popleft()
        rest = conn.take()
        self.connections.renew(conn)
        if rest:
            conn.incoming.feed(rest)
            self.connections.count(conn)
        return conn

    def finish(self, conn: Connection, *, is_last: bool) -> None:
        """After an answer: have it read, then expect the next request, or close if it ``is_last``.

        For all of it a client has no longer than a request may take.
        """
        then = self.connections.linger if is_last else self._resume
        self.connections.deliver(conn, conn.taken.arrived + self._limits.request_s, then)

    def _resume(self, conn: Connection) -> None:
        conn.kept = True
        self._await(conn, _LAST_WORDS_S if self.stopping else self._limits.idle_s)
        if conn.buffered:
            self._begin(conn)
            self._advance(conn, State.HEAD)

    def refuse(self, conn: Connection, error: ServiceError, why: str) -> None:
        """Answer for the application, and close."""
        self._answer(conn, error, why)
        self.connections.linger(conn)

    def _answer(self, conn: Connection, error: ServiceError, why: str) -> None:
        if conn.sock.unsent:  # of the answer before this one
            return
        head, asked = conn.incoming.request, conn.incoming.asked
        self._refuser.send(conn, error, why, head, asked)

    def _receive(self, conn: Connection) -> None:
        size = _RECEIVE_HEAD if conn.incoming.state is State.HEAD else _RECEIVE
        try:
            count = conn.sock.recv_into(self._scratch, size)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.connections.close(conn)
            return
        if count:
            if not conn.buffered:
                self._begin(conn)
            if self._make_way(conn, count):
                before = conn.incoming.state
                conn.incoming.feed(self._scratch[:count])
                self.connections.count(conn)
                self._advance(conn, before)
        elif conn.buffered:  # it has hung up, or at least will send no more
            self.refuse(conn, malformed(), "ended too early")
        else:
            self.connections.close(conn)

    def _make_way(self, conn: Connection, count: int) -> bool:
        """Have room for ``count`` bytes more of ``conn``: what is unfinished gives way to others.

        The first to go holds most for longest, by bytes times seconds: a client that fills the room
        and dawdles, not the one that has just begun, nor a large upload that is quick. False if
        that is ``conn``.
        """
        now = time.monotonic()
        while self.connections.unread + count > self._limits.unread:
            # Not one that still reads the answer before: what is left of that would be lost.
            refusable = (c for c in self.connections.watched if not c.sock.unsent)
            heaviest = max(refusable, key=lambda c: c.buffered * (now - c.arrived), default=conn)
            if not heaviest.buffered:  # all that is held is whole, and waits for threads
                heaviest = conn
            self.refuse(heaviest, refusals.crowded(), "too many bytes of unfinished uploads")
            if heaviest is conn:
                return False
        return True

    def _begin(self, conn: Connection) -> None:
        """The request's first byte is here."""
        conn.arrived = conn.since = time.monotonic()
        patience = _LAST_WORDS_S if self.stopping else self._limits.head_s
        conn.expires = conn.arrived + patience

    def _advance(self, conn: Connection, before: State) -> None:
        """Do what the request's state asks for."""
        state = conn.incoming.state
        if state is State.TOO_LARGE:
            self.refuse(conn, too_large(self._limits.body), "a chunked body is too large")
        elif state is State.MALFORMED and (fault := conn.incoming.fault):
            self.refuse(conn, of_http(fault), type(fault).__name__)
        elif state is State.BODY and self.stopping:
            self.refuse(conn, Unavailable.stopping(), "stopping")
        elif state is State.BODY and before is State.HEAD:
            conn.expires = min(
                time.monotonic() + self._limits.body_s,
                conn.arrived + self._limits.request_s,
            )
            if conn.incoming.expects_continue:
                refusals.write(conn.sock, b"HTTP/1.1 100 Continue\r\n\r\n")
        elif state in (State.WHOLE, State.REFUSED):
            if conn.kept and not conn.sock.has_room:  # it has not read its last answer
                conn.expires = time.monotonic() + SEND_TIMEOUT_S
                self.connections.watch(conn, self._hand_over, selectors.EVENT_WRITE)
            else:
                self._hand_over(conn)

    def _hand_over(self, conn: Connection) -> None:
        self.connections.unwatch(conn)
        (self._bodies if conn.incoming.has_body else self._heads).append(conn)
