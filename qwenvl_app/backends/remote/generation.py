"""One request's way through the upstreams: attempts, the stream, its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from urllib3 import BaseHTTPResponse

from qwenvl_app.backends.remote.connections import Exchange
from qwenvl_app.backends.remote.failures import (
    TRANSPORT,
    Head,
    UpstreamError,
    broken,
    down,
    of_status,
    of_transport,
)
from qwenvl_app.backends.remote.repetition import Repetition
from qwenvl_app.backends.remote.request import Body
from qwenvl_app.backends.remote.stream import AnswerReader, events
from qwenvl_app.backends.remote.upstreams import Upstream
from qwenvl_app.errors import DeadlineExceeded, ServiceError
from qwenvl_app.generation import Delta, FinishReason, GenerationRequest, Timings

if TYPE_CHECKING:
    from qwenvl_app.backends.remote.backend import RemoteBackend

log = logging.getLogger(__name__)

_PIECE = 64 * 1024
_MOST_ATTEMPTS = 4
_DRAIN_S = 1.0


class RemoteGeneration:
    """One answer; see ``backends.Generation``."""

    def __init__(
        self,
        backend: RemoteBackend,
        request: GenerationRequest,
        body: Body,
        began: float,
        ends: float,
    ):
        self._backend, self._body, self._id = backend, body, request.request_id
        self._repetition = Repetition(request.sampling.repetition_limit)
        self._began, self._ends = began, ends
        self._prepared = self._sent = time.monotonic()
        self._first: float | None = None  # when the first delta came
        self._lock = threading.Lock()
        self._exchange: Exchange | None = None
        self._cancelled = False
        self._stopped: ServiceError | None = None

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come. Tries others as long as there is nothing to tell yet."""
        self._backend.enter(self)
        try:
            with self._backend.alarm.at(self._ends, self._time_is_up):
                yield from self._attempts()
        finally:
            self._backend.leave(self)

    def cancel(self) -> None:
        """Close the connection to the upstream, which ends its work."""
        with self._lock:
            self._cancelled, exchange = True, self._exchange
        if exchange:
            exchange.abort()

    def stop(self, error: ServiceError) -> None:
        """End it with ``error``. Any thread."""
        with self._lock:
            self._stopped, exchange = self._stopped or error, self._exchange
        if exchange:
            exchange.abort()

    def _time_is_up(self) -> None:
        self.stop(DeadlineExceeded())

    def _attempts(self) -> Iterator[Delta]:
        tried: list[Upstream] = []
        reset: list[Upstream] = []  # those that broke off
        error: UpstreamError | None = None
        while True:
            upstream = self._next(tried, reset, error)
            tried.append(upstream)
            try:
                yield from self._attempt(upstream)
                return
            except UpstreamError as failure:
                if self._cancelled:
                    yield Delta("", FinishReason.CANCELLED, timings=self._timings())
                    return
                if self._stopped:
                    raise self._stopped from None
                if time.monotonic() >= self._ends:  # while it connected
                    raise DeadlineExceeded from None
                upstream.failed(failure)
                log.warning("upstream %s: %s (request %s)", upstream.name, failure, self._id)
                error = failure
                if failure.reset:
                    reset.append(upstream)

    def _next(
        self, tried: list[Upstream], reset: list[Upstream], error: UpstreamError | None
    ) -> Upstream:
        """Who is asked, after ``error`` at the last of ``tried``. Raises ServiceError.

        Whoever broke a connection off is asked a second time, if there is nobody else: it may have
        been a connection that was idle for long.
        """
        if error and (self._first or not error.retry or len(tried) >= _MOST_ATTEMPTS):
            raise error.error
        found = self._backend.upstreams.choose(self._body.affinity, tried)
        found = found or next((each for each in reset if tried.count(each) == 1), None)
        if not found:
            raise error.error if error else down()
        if error and not self._backend.budget.spend():
            raise error.error
        return found

    def _attempt(self, upstream: Upstream) -> Iterator[Delta]:
        """Raises UpstreamError."""
        exchange = Exchange(self._ends)
        with self._lock:
            self._exchange = exchange
            if self._cancelled or self._stopped:
                exchange.aborted = True
        with upstream.hold(exchange):
            try:
                response = self._send(upstream, exchange)
            except TRANSPORT as error:
                raise of_transport(error) from None
            try:
                yield from self._read(upstream, exchange, response)
            except TRANSPORT as error:
                raise of_transport(error) from None
            finally:
                response.close()  # nothing, if all of it was read

    def _send(self, upstream: Upstream, exchange: Exchange) -> BaseHTTPResponse:
        body = self._body.to(upstream.software)
        headers = self._backend.headers | {
            "Content-Type": "application/json",
            "Content-Length": str(body.length),
            "Accept": "text/event-stream",
            "X-Request-ID": self._id,
        }
        path = upstream.base + "/v1/chat/completions"
        self._sent = time.monotonic()
        return exchange.send(upstream.pool, "POST", path, headers, body.pieces)

    def _read(
        self, upstream: Upstream, exchange: Exchange, response: BaseHTTPResponse
    ) -> Iterator[Delta]:
        if response.status != 200:
            raise of_status(Head(response.status, response.headers.get("Retry-After")))
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise broken("no stream of events")
        reader, last = AnswerReader(), self._sent
        for data in events(iter(lambda: response.read1(_PIECE), b"")):
            if data == b"[DONE]":
                break
            delta = reader.read(data)
            if delta is None:
                continue
            last = time.monotonic()
            if self._first is None:
                self._first = last
                upstream.has_begun(exchange)
                self._body = Body((), None)  # it won't be sent again, and may be large
            yield delta
            if self._repetition.add(delta.text + delta.reasoning):
                reader.finish = FinishReason.REPETITION
                exchange.abort()  # or it would go on, and cost
                break
        if reader.finish is None:
            raise broken("half a stream")
        if not exchange.aborted:
            self._drain(exchange, response)
        upstream.succeeded()
        yield Delta("", reader.finish, reader.usage, self._timings(last))

    def _drain(self, exchange: Exchange, response: BaseHTTPResponse) -> None:
        """Read the end of the frame, if it comes soon, so that the connection is kept."""
        soon = time.monotonic() + _DRAIN_S
        with suppress(*TRANSPORT), self._backend.alarm.at(soon, exchange.abort):
            if len(response.read(_PIECE)) < _PIECE:
                response.release_conn()
        exchange.settle()

    def _timings(self, last: float | None = None) -> Timings:
        """As seen from here; the upstream's queue is part of ``prefill``."""
        first = self._first or last or self._sent
        return Timings(
            preprocess=self._prepared - self._began,
            prefill=first - self._sent,
            first_token=first - self._began,
            decode=(last or first) - first,
        )
