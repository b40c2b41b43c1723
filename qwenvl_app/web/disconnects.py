"""Noticing clients that close their connection while their request is in flight.

gthread itself looks at a connection again only when it writes the answer. One thread asks the
kernel about all of them: epoll with EPOLLRDHUP, which tells of the end of the connection and not of
bytes that a pipelining client has sent ahead. As for nginx, a client that shuts down its sending
side counts as gone. Where there is no epoll (it is Linux's), nobody is seen to leave.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qwenvl_app.service.deadline import Deadline

log = logging.getLogger(__name__)

_SUPPORTED = hasattr(select, "epoll")


class Disconnects:
    """Watches sockets. All methods may be called on any thread.

    The thread and its descriptors are made for the first request that is watched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, Deadline] = {}
        self._epoll: select.epoll | None = None
        self._bell: socket.socket | None = None  # closed to end the thread
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def watched(self) -> int:
        """Sockets that are being watched; 0 when idle."""
        return len(self._deadlines)

    @contextmanager
    def watch(self, connection: socket.socket | None, deadline: Deadline) -> Iterator[None]:
        """While the block runs, ``deadline.leave()`` is called when its client goes.

        Before the block, if it has gone already. The socket must stay open during the block: its
        number may be another connection's afterwards. None, of a server that tells no socket, is
        not watched.
        """
        number = connection.fileno() if connection and _SUPPORTED else -1
        watched = number >= 0 and self._register(number, deadline)
        try:
            yield
        finally:
            if watched:
                self._unregister(number)

    def close(self) -> None:
        """End the thread. Any number of times; later requests are not watched."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread and self._bell:
            self._bell.close()
            thread.join()

    def _register(self, number: int, deadline: Deadline) -> bool:
        if _has_left(number):
            deadline.leave()
            return False
        with self._lock:
            if self._closed:
                return False
            epoll = self._epoll or self._start()
            epoll.register(number, select.EPOLLRDHUP)  # of HUP and ERR the kernel tells anyway
            self._deadlines[number] = deadline
        return True

    def _unregister(self, number: int) -> None:
        with self._lock:
            # It is out already if the disconnect was noticed, and the epoll is None after close.
            if self._deadlines.pop(number, None) and self._epoll:
                self._epoll.unregister(number)

    def _start(self) -> select.epoll:
        epoll = select.epoll()
        bell, listener = socket.socketpair()
        epoll.register(listener.fileno(), select.EPOLLRDHUP)
        thread = threading.Thread(
            target=self._run, args=(epoll, listener), name="disconnects", daemon=True
        )
        thread.start()
        self._epoll, self._bell, self._thread = epoll, bell, thread
        return epoll

    def _run(self, epoll: select.epoll, listener: socket.socket) -> None:
        bell = listener.fileno()
        while bell not in (numbers := [number for number, _ in epoll.poll()]):
            for number in numbers:
                self._disconnected(epoll, number)
        with self._lock:
            self._epoll = None
            epoll.close()
            listener.close()

    def _disconnected(self, epoll: select.epoll, number: int) -> None:
        with self._lock:
            # What was told may be of a connection that has ended since and whose number another
            # one has now: ask again, while nobody can unregister it.
            if number not in self._deadlines or not _has_left(number):
                return
            epoll.unregister(number)
            deadline = self._deadlines.pop(number)
        try:
            deadline.leave()
        except Exception:  # or nobody else would be seen to leave
            log.exception("what was to happen when a client left failed")


def _has_left(number: int) -> bool:
    """Whether the other side of a socket has closed it, or shut down its sending side."""
    poll = select.poll()
    poll.register(number, select.POLLRDHUP)
    return bool(poll.poll(0))
