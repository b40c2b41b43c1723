"""A client's connection: what the worker's loop knows of it, and what its thread does."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from gunicorn.config import Config
from gunicorn.http import Request, RequestParser
from gunicorn.workers.gthread import TConn

from qwenvl_app.server.framing import Asked, Incoming, State
from qwenvl_app.server.outgoing import Outgoing

SEND_TIMEOUT_S = 10  # for a client that does not read its answer


@dataclass(frozen=True)
class Taken:
    """A request that a thread has."""

    arrived: float  # monotonic: its first byte
    whole: bool  # it is all there, and not only a head that is refused
    has_body: bool
    asked: Asked
    pieces: Generator[bytes, None, None]  # of its bytes, given up as gunicorn's parser reads them


class _Parsed(RequestParser):  # type: ignore[misc]
    """gunicorn's parser, of one request whose head the loop has parsed: not a second time."""

    def __init__(self, head: Request, pieces: Generator[bytes, None, None]):
        super().__init__(head.cfg, pieces, head.peer_addr)
        self._head: Request | None = head
        head.unreader.iter = pieces  # the body's reader reads on there
        self.unreader = head.unreader

    def __next__(self) -> Request:
        """The request."""
        self.mesg, self._head = self._head, None
        if self.mesg is None:
            raise StopIteration
        return self.mesg


class Connection(TConn):  # type: ignore[misc]
    """A client, and the request that it is sending.

    The loop's, but for ``taken`` and ``parser``: the loop sets those before a thread has the
    connection, and only the thread uses them until it gives it back.
    """

    sock: Outgoing

    def __init__(self, cfg: Config, sock: Outgoing, client: Any, server: Any):
        super().__init__(cfg, sock, client, server)
        self.initialized = True  # there is a new parser for every request: ``take``
        self.incoming: Incoming
        self.taken: Taken
        self.buffered = 0  # bytes in ``incoming``, as the reception has counted them
        self.arrived = self.since = 0.0  # monotonic: first byte of the request; in this state since
        self.expires = 0.0  # monotonic: when this state has to have ended
        self.kept = False  # it has had an answer already
        self.delivered: Callable[[Connection], None]  # what is called when its answer is sent
        self.deliver_by = 0.0  # monotonic
        self.lingering = 0  # bytes still to be thrown away before the end; 0: not closing yet
        self.ready: Callable[[Connection], None]  # what the poller's next event calls

    def take(self) -> bytes:
        """Make what is there the request of a thread, with a parser; returns what follows it."""
        incoming = self.incoming
        whole, has_body, asked = (
            incoming.state is State.WHOLE,
            incoming.has_body,
            incoming.asked,
        )
        head = incoming.drop_head() if whole else None
        pieces, rest = incoming.take()
        self.taken = Taken(self.arrived, whole, has_body, asked, pieces)
        # What is not valid the same parser refuses again, where it can be answered.
        self.parser = (
            _Parsed(head, pieces) if head else RequestParser(self.cfg, pieces, self.client)
        )
        self.sock.hold()  # the head of the answer
        return rest
