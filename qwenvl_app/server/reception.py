"""Connections until a request of theirs is there: read without blocking, under limits.

Everything here runs on the thread of the worker's loop.
"""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import time
from collections.abc import Callable
from functools import partial

from gunicorn.config import Config
from gunicorn.http import Request, RequestParser

from qwenvl_app.errors import ServiceError, Unavailable
from qwenvl_app.server import refusals
from qwenvl_app.server.connection import Connection
from qwenvl_app.server.framing import Incoming, Rules, State
from qwenvl_app.settings import Settings
from qwenvl_app.web import proxies
from qwenvl_app.web.errors import malformed, of_http

# Bytes at a time. Of a body much, since every call may wait for the GIL; of a head less, since what
# belongs to the requests after it is copied with each of them.
_RECEIVE, _RECEIVE_HEAD = 2**20, 2**16
_ACCEPT = 64  # connections at a time
_SEND_TIMEOUT_S = 10  # for a client that does not read its answer
_SEND_TIMEOUT = struct.pack("ll", _SEND_TIMEOUT_S, 0)  # struct timeval
# Room for answers that a client has not read yet. A connection's next request is taken up only
# while a third of it is free, so that an answer fits and no thread waits for the client to read.
_SEND_BUFFER = 2**18
# A client that is still sending gets to read its answer first: a socket that is closed with bytes
# unread is reset. For so long, and so many bytes, what it sends is thrown away.
_LINGER_S = 5.0
_LINGER_BYTES = 64 * 2**20
_LAST_WORDS_S = 2.0  # at the end of a stop, for clients that are connected and have not asked yet
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Reception:
    """All connections.

    ``serve`` is called with each that has a request for a thread, ``refused`` with each error that
    is answered here. ``admits`` says of a head whether its body is worth waiting for; if not, the
    application gets the head alone, to say so.
    """

    def __init__(
        self,
        cfg: Config,
        settings: Settings,
        poller: selectors.BaseSelector,
        serve: Callable[[Connection], None],
        refused: Callable[[ServiceError], None],
        admits: Callable[[Request], bool],
    ):
        self.cfg, self.settings, self.poller, self.serve = cfg, settings, poller, serve
        self._refused = refused
        self.connections: dict[socket.socket, Connection] = {}
        self.stopping = False
        self._reading: set[Connection] = set()  # with the poller: idle, unfinished or lingering
        self._scratch = memoryview(bytearray(_RECEIVE))
        self._rules = Rules(cfg, settings.max_upload_mb * 2**20, admits)
        self._buffered = 0  # bytes of all requests that no thread has taken
        # One upload of the largest kind fits in any case.
        self._max_buffered = max(settings.upload_buffer_mb, 2 * settings.max_upload_mb) * 2**20

    @property
    def has_room(self) -> bool:
        """Whether one more can be accepted, if need be for one that goes."""
        return len(self.connections) < self.cfg.worker_connections or bool(self._reading)

    def accept(self, listener: socket.socket) -> None:
        """Take connections that are waiting, as long as there is room, and up to a number.

        Then it is the others' turn: a flood of them must not hold the loop.
        """
        for _ in range(_ACCEPT):
            if len(self.connections) >= self.cfg.worker_connections and not self._make_room():
                return
            try:
                sock, client = listener.accept()
            except OSError as error:
                if error.errno in _FULL and self._make_room():
                    continue
                return
            conn = Connection(self.cfg, sock, client, listener.getsockname())
            self.connections[sock] = conn
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            # Not settimeout: with that, Python waits for a third of the buffer before it sends.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
            self._renew(conn)
            self.await_request(conn, self.settings.header_timeout_s)
            self._receive(conn)

    def _make_room(self) -> bool:
        """Drop the connection that has been unfinished for longest, if any is."""
        if not self._reading:
            return False
        conn = min(self._reading, key=lambda conn: conn.since)
        if conn.buffered:
            self._answer(conn, refusals.crowded(), "no room")
        self.close(conn)
        return True

    def await_request(self, conn: Connection, patience: float) -> None:
        """Read the connection's next request, whose first byte is due in ``patience`` seconds."""
        conn.since = time.monotonic()
        conn.deadline = conn.since + patience
        self._watch(conn)

    def begin_stop(self) -> None:
        """Refuse all requests that are not whole."""
        self.stopping = True
        for conn in [conn for conn in self._reading if conn.buffered]:
            self.refuse(conn, Unavailable.stopping(), "stopping")

    def last_orders(self) -> None:
        """Leave connections that wait for a request but a moment."""
        last = time.monotonic() + _LAST_WORDS_S
        for conn in self._reading:
            if conn.lingering is None:
                conn.deadline = min(conn.deadline, last)

    def expire(self) -> None:
        """Deal with those whose time is over."""
        now = time.monotonic()
        for conn in [conn for conn in self._reading if conn.deadline <= now]:
            if not conn.buffered:
                self.close(conn)
            elif self.stopping:
                self.refuse(conn, Unavailable.stopping(), "stopping")
            else:
                self.refuse(conn, refusals.late(), "too slow")

    def take(self, conn: Connection) -> None:
        """Give the request to gunicorn's parser, for a thread. What follows it stays."""
        incoming = conn.incoming
        conn.whole, conn.has_body = incoming.state is State.WHOLE, incoming.has_body
        conn.is_head = incoming.is_head
        conn.pieces, rest = incoming.take()
        conn.parser = RequestParser(self.cfg, conn.pieces, conn.client)
        self._renew(conn)
        if rest:
            conn.incoming.feed(rest)
            self._count(conn)

    def resume(self, conn: Connection) -> None:
        """After an answer: the next request of a connection that is kept."""
        conn.kept = True
        self.await_request(conn, _LAST_WORDS_S if self.stopping else self.cfg.keepalive)
        if conn.buffered:
            self._begin(conn)
            self._advance(conn, State.HEAD)

    def refuse(self, conn: Connection, error: ServiceError, why: str) -> None:
        """Answer for the application, and close."""
        self._answer(conn, error, why)
        self.linger(conn)

    def answer(
        self, conn: Connection, error: ServiceError, request: Request | None, why: str
    ) -> None:
        """Answer the request that a thread has, on that thread. The caller closes."""
        hops = self.settings.trusted_hops
        client = proxies.client(conn.client, request.headers if request else (), hops)
        self._refused(error)  # before it is sent, so that who has the answer finds it counted
        refusals.send(conn.sock, error, request, refusals.Notes(why, client, conn.is_head))

    def _answer(self, conn: Connection, error: ServiceError, why: str) -> None:
        conn.is_head = conn.incoming.is_head
        self.answer(conn, error, conn.incoming.request, why)

    def linger(self, conn: Connection) -> None:
        """Close when the client has, or soon."""
        self._renew(conn)
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(conn)
            return
        conn.lingering, conn.since = _LINGER_BYTES, 0.0
        conn.deadline = time.monotonic() + _LINGER_S
        self._watch(conn)

    def close(self, conn: Connection) -> None:
        """Close now."""
        self._renew(conn)
        self._unwatch(conn)
        del self.connections[conn.sock]
        conn.close()

    def _watch(self, conn: Connection) -> None:
        ready = partial(self._receive, conn)
        if conn in self._reading:
            self.poller.modify(conn.sock, selectors.EVENT_READ, ready)
            return
        conn.sock.setblocking(False)
        self._reading.add(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, ready)

    def _unwatch(self, conn: Connection) -> None:
        if conn in self._reading:
            self._reading.remove(conn)
            self.poller.unregister(conn.sock)

    def _renew(self, conn: Connection) -> None:
        conn.incoming = Incoming(self._rules, conn.client)
        self._count(conn)

    def _count(self, conn: Connection) -> None:
        self._buffered += len(conn.incoming.buffer) - conn.buffered
        conn.buffered = len(conn.incoming.buffer)

    def _receive(self, conn: Connection, _sock: object = None) -> None:
        if conn not in self._reading:  # closed since the poller saw it
            return
        in_head = conn.lingering is None and conn.incoming.state is State.HEAD
        try:
            count = conn.sock.recv_into(self._scratch, _RECEIVE_HEAD if in_head else _RECEIVE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close(conn)
            return
        if conn.lingering is not None:
            conn.lingering -= count
            if not count or conn.lingering < 0:
                self.close(conn)
        elif not count:  # it has hung up, or at least will send no more
            if conn.buffered:
                self.refuse(conn, malformed(), "ended too early")
            else:
                self.close(conn)
        else:
            if not conn.buffered:
                self._begin(conn)
            if self._make_way(conn, count):
                before = conn.incoming.state
                conn.incoming.feed(self._scratch[:count])
                self._count(conn)
                self._advance(conn, before)

    def _make_way(self, conn: Connection, count: int) -> bool:
        """Have room for ``count`` bytes more of ``conn``: what is unfinished gives way to others.

        The first to go holds most for longest, by bytes times seconds: a client that fills the room
        and dawdles, not the one that has just begun, nor a large upload that is quick. False if
        that is ``conn``.
        """
        now = time.monotonic()
        while self._buffered + count > self._max_buffered:
            heaviest = max(self._reading, key=lambda c: c.buffered * (now - c.arrived))
            if not heaviest.buffered:  # all that is held is whole, and waits for threads
                heaviest = conn
            self.refuse(heaviest, refusals.crowded(), "too many bytes of unfinished uploads")
            if heaviest is conn:
                return False
        return True

    def _begin(self, conn: Connection) -> None:
        """The request's first byte is here."""
        conn.arrived = conn.since = time.monotonic()
        patience = _LAST_WORDS_S if self.stopping else self.settings.header_timeout_s
        conn.deadline = conn.arrived + patience

    def _advance(self, conn: Connection, before: State) -> None:
        """Do what the request's state asks for."""
        state = conn.incoming.state
        if state is State.TOO_LARGE:
            error = refusals.too_large(self._rules.max_body)
            self.refuse(conn, error, "a chunked body is too large")
        elif state is State.MALFORMED and (fault := conn.incoming.fault):
            self.refuse(conn, of_http(fault), type(fault).__name__)
        elif state is State.BODY and self.stopping:
            self.refuse(conn, Unavailable.stopping(), "stopping")
        elif state is State.BODY and before is State.HEAD:
            conn.deadline = min(
                time.monotonic() + self.settings.body_timeout_s,
                conn.arrived + self.settings.request_timeout_s,
            )
            if conn.incoming.expects_continue:
                refusals.write(conn.sock, b"HTTP/1.1 100 Continue\r\n\r\n")
        elif state in (State.WHOLE, State.REFUSED):
            if conn.kept:  # it may not have read its last answer
                conn.deadline = time.monotonic() + _SEND_TIMEOUT_S
                ready = partial(self._begin_answer, conn)
                self.poller.modify(conn.sock, selectors.EVENT_WRITE, ready)
            else:
                self._begin_answer(conn)

    def _begin_answer(self, conn: Connection, _sock: object = None) -> None:
        if conn in self._reading and conn.lingering is None:  # else refused since the poller saw it
            self._unwatch(conn)
            self.serve(conn)
