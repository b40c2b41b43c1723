"""The gunicorn worker: a request takes a thread only once it is there, head and body.

gunicorn's own gthread worker reads on the threads of its pool, so that a client that trickles holds
one for as long as it likes. Here the main loop reads (``reception.py``) and hands over whole
requests; gunicorn's parser gets them from memory and no thread ever reads a socket. ``options.py``
says why there is no TLS.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from gunicorn.config import Config
from gunicorn.http import Request
from gunicorn.http.errors import InvalidHeader
from gunicorn.workers.gthread import ThreadWorker

from qwenvl_app import process, sharing
from qwenvl_app.errors import ServiceError
from qwenvl_app.server import listeners, options
from qwenvl_app.server.connection import Connection
from qwenvl_app.server.hooks import hook
from qwenvl_app.server.limits import Limits
from qwenvl_app.server.reception import Reception
from qwenvl_app.server.refusals import Refusals
from qwenvl_app.settings import current
from qwenvl_app.web.errors import of_http

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

SPARE_THREADS = 4  # that no request with a body gets: for health checks and metrics
_TICK_S = 0.5
_HEARTBEAT_S = 1.0  # of the master's time-out, which is a minute
_HANDSHAKE_S = 0.2  # for those that are under way when nobody else is let in
_KILL_MARGIN_S = 2.0  # by which a stop ends before the master would kill
_OTHER_FILES = 256  # the model's, the listeners, the log


class Worker(ThreadWorker):  # type: ignore[misc]
    """See the module's docstring. On the pool's threads: the methods named ``handle...``."""

    alive: bool
    wsgi: WSGIApplication
    reception: Reception
    refuser: Refusals

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_keepalived = self.worker_connections  # gthread would want more than threads
        self._bodies = 0  # requests with a body that have one
        self._busy: set[Connection] = set()  # connections whose request has one
        self._thread = threading.local()  # ``conn``: what this thread answers
        self._open = True
        self._beat = 0.0  # monotonic: when the next heartbeat is due

    @classmethod
    def check_config(cls, cfg: Config, log: Any) -> None:
        """End the start of a gunicorn whose options don't work here, with one sentence."""
        if fault := options.fault(cfg):
            log.critical("%s", fault)
            sys.exit(os.EX_CONFIG)

    def get_thread_pool(self) -> ThreadPoolExecutor:
        """The pool, with all its threads: one that can't be had is told now, not in a request."""
        pool: ThreadPoolExecutor = super().get_thread_pool()
        all_here = threading.Barrier(self.cfg.threads + 1)
        try:
            for _ in range(self.cfg.threads):
                pool.submit(all_here.wait)
            all_here.wait()
        except RuntimeError:
            all_here.abort()
            raise
        return pool

    def load_wsgi(self) -> None:
        """Load the application, and tell it more about every request."""
        super().load_wsgi()
        application = self.wsgi

        def informed(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            environ["qwenvl.arrived"] = self._thread.conn.taken.arrived
            return application(environ, start)

        self.wsgi = informed

    def handle(self, conn: Connection) -> bool:
        """Answer the request of ``conn``; whether the connection can be used again."""
        self._thread.conn = conn
        return bool(super().handle(conn))

    def handle_request(self, req: Request, conn: Connection) -> bool:
        """As ``handle``, of a valid head."""
        if _lacks_host(req):
            raise InvalidHeader("HOST", req=req)
        req._expected_100_continue = False  # the loop has answered that
        if not conn.taken.whole:
            req.force_close()
        try:
            return bool(super().handle_request(req, conn)) and not req.body.failed
        finally:
            # gunicorn would read what nobody has of this request's body, or close if it is long;
            # but it is not in the way of the next request: it is in memory, and its end is known.
            conn.parser.mesg = None

    def handle_error(
        self, req: Request | None, client: socket.socket, addr: object, exc: BaseException
    ) -> None:
        """Answer a request that the application does not."""
        conn: Connection = self._thread.conn
        self.refuser.send(conn, of_http(exc), type(exc).__name__, req, conn.taken.asked)

    def handle_quit(self, sig: int, frame: object) -> None:
        """SIGINT and SIGQUIT: end at once, whatever the threads are doing."""
        os._exit(0)

    def run(self) -> None:
        """Serve until told to stop; then answer everybody, and return."""
        process.allow_files(self.worker_connections + _OTHER_FILES)
        settings = current()
        limits = Limits.of(settings, self.cfg)
        self.refuser = Refusals(self._count, settings.trusted_hops)
        self.reception = Reception(self.cfg, limits, self.poller, self.refuser, self._wants_body)
        queue = self.method_queue
        self.poller.register(queue.fileno(), selectors.EVENT_READ, queue.run_callbacks)
        while self.alive and self.is_parent_alive():
            self._turn()
        self.alive = False
        self._stop(time.monotonic() + self.cfg.graceful_timeout - _KILL_MARGIN_S)
        for conn in self.reception.connections.all:
            conn.close()
        self.tpool.shutdown(wait=False)
        self.poller.close()
        queue.close()

    def _count(self, error: ServiceError) -> None:
        if refused := hook(self.app.callable, "refused"):
            refused(error.status, error.reason)

    def _wants_body(self, req: Request) -> bool:
        """Whether to wait for a request's body. Not without a key, wherever it is sent."""
        has_key = hook(self.app.callable, "has_key")
        # As gunicorn tells it the application.
        sent = ",".join(value for name, value in req.headers if name == "AUTHORIZATION")
        return not _lacks_host(req) and (has_key is None or bool(has_key(sent)))

    def accept(self, listener: socket.socket) -> None:
        """Take new connections."""
        self.reception.accept(listener)

    def _turn(self) -> None:
        if (now := time.monotonic()) >= self._beat:
            self._beat = now + min(_HEARTBEAT_S, self.timeout / 4)
            self.notify()
        self._start_waiting()
        self.set_accept_enabled(self._open and self.reception.has_room)
        self.wait_for_and_dispatch_events(_TICK_S)
        self.reception.expire()

    def _start_waiting(self) -> None:
        """Give requests to threads; bodies only while that leaves some to spare."""
        most = max(1, self.cfg.threads - SPARE_THREADS)
        while conn := self.reception.take(bodies=self._bodies < most):
            self._bodies += conn.taken.has_body
            self._busy.add(conn)
            self.enqueue_req(conn)

    def finish_request(self, conn: Connection, fs: Future[bool]) -> None:
        """The thread is done: send the rest of the answer, as its client reads, and go on."""
        self._busy.remove(conn)
        conn.taken.pieces.close()  # of a body that nobody read
        self._bodies -= conn.taken.has_body
        self.reception.finish(conn, is_last=fs.exception() is not None or not fs.result())

    @property
    def _begun(self) -> set[Connection]:
        """Those of which a request is here, or a part that would not be refused."""
        unfinished = set() if self.reception.stopping else self.reception.unfinished
        return self._busy | self.reception.waiting | unfinished

    def _refuse_the_rest(self) -> None:
        if drain := hook(self.app.callable, "drain"):
            drain()
        self.reception.begin_stop()

    def _take_the_last(self) -> None:
        """Accept all who are connected, or about to be, and let nobody else connect."""
        for listener in self.sockets:
            listeners.mute(listener)
        settled = time.monotonic() + _HANDSHAKE_S
        while time.monotonic() < settled:
            for listener in self.sockets:
                self.accept(listener)
            self.wait_for_and_dispatch_events(0.01)

    def _stop(self, end: float) -> None:
        """Answer what came before; what comes meanwhile the application refuses with 503.

        While the service goes on, in other workers, those have what comes, and here nobody is
        refused who has begun to send.
        """
        alone = listeners.owned_alone(self.sockets, self.ppid)
        self._open = alone
        if alone:
            self._refuse_the_rest()
        before = self._begun
        while before & self._begun and time.monotonic() < end:
            self._turn()
        self._open = False
        if not alone:
            self._refuse_the_rest()
        self.set_accept_enabled(False)
        with (
            sharing.one_at_a_time()
        ):  # or of two that end together each would leave it to the other
            if alone and not listeners.held_by_others(self.sockets, self.ppid):
                self._take_the_last()
            for listener in self.sockets:
                listener.close()
        self.reception.last_orders()
        while self.reception.connections.all and time.monotonic() < end:
            self._turn()


def _lacks_host(req: Request) -> bool:
    """RFC 9112, section 3.2: such a request of HTTP/1.1 is to be answered with 400."""
    return req.version >= (1, 1) and not any(name == "HOST" for name, _ in req.headers)
