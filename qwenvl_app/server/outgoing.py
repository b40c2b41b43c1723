"""Answers on their way out: what a client does not read waits here, and no thread waits with it."""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)

_RESET = struct.pack("ii", 1, 0)  # struct linger: what is not sent is dropped by the kernel too
# A connection's next request is taken up only while a third of it is free: a client that asks and
# never reads is not asked what it wants next.
_SEND_BUFFER = 2**18


class UnreadAnswers:
    """What clients have not read yet, all of them together: at most ``most`` bytes.

    All methods may be called on any thread.
    """

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._sizes: dict[Outgoing, int] = {}

    def note(self, sock: Outgoing, size: int) -> None:
        """``size`` bytes wait for the client of ``sock``. Too many: who has most is dropped.

        The connection is shut down; its thread finds that out by writing, and ``disconnects`` does.
        """
        with self._lock:
            self._sizes.pop(sock, None)
            if size:
                self._sizes[sock] = size
            while sum(self._sizes.values()) > self._most:
                most = max(self._sizes, key=self._sizes.__getitem__)
                log.info("too much is unread: dropping a client, %d bytes", self._sizes.pop(most))
                most.cut()


class Outgoing(socket.socket):
    """The socket of an accepted connection. ``sendall`` never waits: see ``unsent``.

    One thread at a time writes: the one that answers, then the loop.
    """

    def __init__(self, accepted: socket.socket, unread: UnreadAnswers):
        super().__init__(fileno=accepted.detach())
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        super().setblocking(False)
        self.unsent = bytearray()  # what the kernel has no room for, or is held
        self._holds = False
        self._unread = unread

    def setblocking(self, flag: bool, /) -> None:
        """Nothing: it never blocks. gunicorn asks for either with every request."""

    def hold(self) -> None:
        """Let the next ``sendall`` wait for the one after it, or ``flush``.

        gunicorn sends the head of an answer by itself: a call more into the kernel, after which its
        thread waits for the GIL, and a client that is woken up for nothing.
        """
        self._holds = True

    @property
    def has_room(self) -> bool:
        """Whether the kernel would take more of an answer, as ``EVENT_WRITE`` tells it."""
        room = select.poll()
        room.register(self, select.POLLOUT)
        return bool(room.poll(0))

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """Send ``data``, or keep it for ``flush``. Raises OSError if the client has gone."""
        self.unsent += data
        if self._holds:
            self._holds = False
        else:
            self.flush(flags)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """As ``sendall``. The kernel's own would wait, and overtake what is ``unsent``.

        gunicorn sends files so, and those of the page are small.
        """
        file.seek(offset)
        data = file.read(-1 if count is None else count)
        self.sendall(data)
        return len(data)

    def flush(self, flags: int = 0) -> None:
        """Send as much of ``unsent`` as the kernel takes. Raises OSError if the client has gone."""
        while self.unsent:
            try:
                sent = self.send(self.unsent, flags | socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            del self.unsent[:sent]
        self._unread.note(self, len(self.unsent))

    def cut(self) -> None:
        """Let nothing more be read or written; the descriptor stays open. Any thread."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("it is gone already")

    def close(self) -> None:
        """Close; if the client has left an answer unread, at once and with a reset."""
        if self.unsent and self.fileno() >= 0:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.unsent.clear()
        self._unread.note(self, 0)
        super().close()
