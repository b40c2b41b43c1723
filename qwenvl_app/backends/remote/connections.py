"""Pooled connections to one upstream, each of which can be cut off by another thread.

urllib3's own ``shutdown`` of a response comes too late: an upstream may send its first byte when
the answer is written. No proxies of the environment, no redirects, TLS verified with the system's
certificates. Its debug log has the path, which holds nothing of a request.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from http.client import RemoteDisconnected
from typing import Any
from urllib.parse import urlsplit

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ProtocolError

_CLOSED = (RemoteDisconnected, ConnectionResetError, BrokenPipeError)  # without an answer
_SMALL = 2**16  # bytes of a body that are copied rather than sent by themselves
CONNECT_S = 3.0  # also of a TLS handshake

_current = threading.local()


class Exchange:
    """One request and its answer. ``abort`` may be called on any thread, at any time.

    ``ends`` is a point of ``time.monotonic()``, after which whoever made it aborts it.
    """

    def __init__(self, ends: float):
        self.ends = ends
        self.aborted = False
        self.kept = False  # it goes over a connection that served another before
        self._lock = threading.Lock()
        self._connection: _Abortable | None = None

    @property
    def left(self) -> float:
        """Seconds, at least a moment."""
        return max(0.01, self.ends - time.monotonic())

    @property
    def patience(self) -> float:
        """Time-out of a socket: whoever aborts the exchange is to come first."""
        return self.left + 1

    def send(
        self,
        pool: HTTPConnectionPool,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Iterable[bytes] | None = None,
    ) -> BaseHTTPResponse:
        """Send it and wait for the head of the answer. Raises ``failures.TRANSPORT``.

        A server may close a connection that was kept as it is used again, which says nothing about
        the server: the request goes over another (RFC 9112, section 9.3.1).
        """
        while True:
            try:
                return self._send(pool, method, path, headers, body)
            except ProtocolError as error:
                if self.aborted or not (self.kept and isinstance(error.args[-1], _CLOSED)):
                    raise

    def _send(
        self,
        pool: HTTPConnectionPool,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Iterable[bytes] | None,
    ) -> BaseHTTPResponse:
        _current.exchange = self
        try:
            return pool.urlopen(
                method,
                path,
                body=body,
                headers=headers,
                retries=False,
                redirect=False,
                timeout=Timeout(connect=min(CONNECT_S, self.left), read=self.patience),
                preload_content=False,
                decode_content=False,
            )
        finally:
            _current.exchange = None

    def use(self, connection: _Abortable) -> None:
        """The exchange goes over this one; cut off at once if it was aborted before."""
        with self._lock:
            self._connection = connection
            connection.owner = self
            if self.aborted:
                connection.cut(self)

    def settle(self) -> None:
        """All of the answer was read. The connection may serve another by now: it is let go."""
        with self._lock:
            self._connection = None

    def abort(self) -> None:
        """Close the connection, so that the upstream stops and whoever reads it goes on."""
        with self._lock:
            self.aborted = True
            if self._connection:
                self._connection.cut(self)


class _Abortable(HTTPConnection):
    """A connection that knows which exchange it serves: those before it cannot cut it off."""

    owner: Exchange | None = None
    _head: bytes | None = None  # of a request; held until what follows it. None: it was sent
    _cuttable: socket.socket | None = None  # ``sock`` is None once an answer ends the connection

    def connect(self) -> None:
        """On the exchange's thread."""
        super().connect()
        self._begin(kept=False)

    def request(self, *args: Any, **kwargs: Any) -> None:
        """On the exchange's thread, over a new connection or one that was idle."""
        if self.sock is not None:
            self._begin(kept=True)
        self._head = b""
        super().request(*args, **kwargs)
        if self._head:  # nothing followed it
            self.send(b"")

    def send(self, data: Any) -> None:
        """As ``http.client``, but that a small body goes with its head: one call, one packet."""
        if self._head == b"":
            self._head = data
            return
        if self._head:
            head, self._head = self._head, None
            if len(data) > _SMALL:
                super().send(head)
            else:
                data = head + data
        super().send(data)

    def cut(self, owner: Exchange) -> None:
        """Any thread. The plain socket's: SSLSocket's own drops the TLS state under its reader."""
        if self.owner is owner and self._cuttable:
            with suppress(OSError):
                socket.socket.shutdown(self._cuttable, socket.SHUT_RDWR)

    def _begin(self, *, kept: bool) -> None:
        exchange: Exchange | None = getattr(_current, "exchange", None)
        if exchange:
            # Or a large body had to be sent within the time for connecting.
            self.timeout = exchange.patience
            self.sock.settimeout(exchange.patience)
            self._cuttable = self.sock
            exchange.kept = kept
            exchange.use(self)


class _AbortableTls(_Abortable, HTTPSConnection):
    """The same over TLS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Abortable


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _AbortableTls


def pool(url: str, size: int) -> HTTPConnectionPool:
    """For ``url``, of which scheme, host and port count; ``size`` connections are kept."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return _TlsPool(host, parts.port, maxsize=size, ssl_context=context)
    return _Pool(host, parts.port, maxsize=size)
