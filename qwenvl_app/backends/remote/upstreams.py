"""The servers that do the work: which of them is well, and which one is asked next."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from qwenvl_app.backends.remote.alarm import Alarm
from qwenvl_app.backends.remote.connections import Exchange, pool
from qwenvl_app.backends.remote.failures import TRANSPORT, UpstreamError
from qwenvl_app.backends.remote.stream import models
from qwenvl_app.generation import Phase, Status

log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 5.0
_LONGEST_LIST = 2**20  # bytes of a list of models
_PATIENCE = 2  # probes in a row that fail before those who wait there are sent elsewhere
_FIRST_REST_S, _LONGEST_REST_S = 0.5, 30.0
# Of the mean load, what a picture's favourite may have (bounded loads, arXiv:1608.01350), and what
# it may have in any case: among few requests one more is no overload (benchmarks/affinity.py).
SHARE, FLOOR = 1.25, 4.0


class Upstream:
    """One server. All methods may be called on any thread."""

    def __init__(self, url: str, connections: int):
        parts = urlsplit(url)
        self.name = parts.netloc  # for the log
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.pool = pool(url, connections)
        self.problem: str | None = "not asked yet"  # None: the last probe was well
        self.asked = threading.Event()  # it was probed
        self.for_operator = False  # whether waiting would not mend the problem
        self.software = ""  # "vllm", "llamacpp": who owns its model, as its list has it
        self.running = 0
        self._lock = threading.Lock()
        self._failures = 0  # of requests, in a row
        self._rests_until = self._busy_until = 0.0
        self._waiting: set[Exchange] = set()
        self._seed = hashlib.blake2b(url.encode(), digest_size=16).digest()

    @property
    def rests(self) -> bool:
        """Whether it failed a moment ago."""
        return time.monotonic() < self._rests_until

    @property
    def busy(self) -> bool:
        """Whether it asked to be left alone."""
        return time.monotonic() < self._busy_until

    def weight(self, affinity: bytes) -> bytes:
        """Rendezvous hashing: a picture's favourite is where this is largest."""
        return hashlib.blake2b(affinity, key=self._seed, digest_size=16).digest()

    @contextmanager
    def hold(self, exchange: Exchange) -> Iterator[None]:
        """Count a request that runs while the block does."""
        with self._lock:
            self.running += 1
            self._waiting.add(exchange)
        try:
            yield
        finally:
            self.has_begun(exchange)
            with self._lock:
                self.running -= 1

    def has_begun(self, exchange: Exchange) -> None:
        """Something was generated: from now on nobody else could go on with it."""
        with self._lock:
            self._waiting.discard(exchange)

    def send_away(self) -> None:
        """Cut off all for whom nothing was generated yet; they may ask another."""
        with self._lock:
            waiting = list(self._waiting)
        for exchange in waiting:
            exchange.abort()

    def succeeded(self) -> None:
        """It gave an answer."""
        with self._lock:
            self._failures, self._rests_until = 0, 0.0

    def failed(self, error: UpstreamError) -> None:
        """It gave none: left out for a while, which doubles each time."""
        with self._lock:
            if error.busy_s is not None:
                self._busy_until = time.monotonic() + min(error.busy_s, _LONGEST_REST_S)
            if error.faulty:
                rest = _FIRST_REST_S * 2 ** min(self._failures, 10)
                self._failures += 1
                self._rests_until = time.monotonic() + min(rest, _LONGEST_REST_S)


class Upstreams:
    """All of them, with a thread each that probes it every ``probe_s`` seconds.

    One that is unwell is asked more often at first, then more seldom. ``status`` is of all.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        headers: Mapping[str, str],
        alarm: Alarm,
        connections: int,
        probe_s: float,
    ):
        self.all = [Upstream(url, connections) for url in dict.fromkeys(urls)]
        self._model, self._headers = model, dict(headers)
        self._alarm, self._probe_s = alarm, probe_s
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._status = Status(Phase.LOADING, "asking the upstreams")
        self._probes: dict[Upstream, Exchange] = {}
        for upstream in self.all:
            name = f"probe-{upstream.name}"
            threading.Thread(target=self._watch, args=(upstream,), name=name, daemon=True).start()

    def status(self) -> Status:
        """READY if one is well; FAILED if all that could be is for the operator to do."""
        return self._status

    def choose(self, affinity: bytes | None, tried: Collection[Upstream]) -> Upstream | None:
        """The best one that was not ``tried``; None if there is none. One that failed comes last.

        The favourite of the picture, unless it has much more to do than others; else the least
        busy.
        """
        well = [each for each in self.all if each.problem is None and each not in tried]
        for group in (
            [each for each in well if not each.rests and not each.busy],
            [each for each in well if not each.rests],
            well,
        ):
            if not group:
                continue
            if affinity is not None:
                favourite = max(group, key=lambda each: each.weight(affinity))
                mean = (sum(each.running for each in group) + 1) / len(group)
                if favourite.running + 1 <= max(FLOOR, SHARE * mean) + 1:
                    return favourite
            return min(group, key=lambda each: (each.running, random.random()))
        return None

    def wait(self) -> None:
        """Until each was probed once. Bounded by the probes' time-outs."""
        for each in self.all:
            each.asked.wait()

    def close(self) -> None:
        """End the threads, and every exchange for which nothing was generated."""
        self._closed.set()
        with self._lock:
            self._status = Status.draining()
            probes = list(self._probes.values())
        for exchange in probes:
            exchange.abort()
        for upstream in self.all:
            upstream.pool.close()

    # From here on: the upstream's own thread.

    def _watch(self, upstream: Upstream) -> None:
        failures = 0
        while not self._closed.is_set():
            problem, for_operator = self._probe(upstream)
            if self._closed.is_set():
                return
            failures = failures + 1 if problem else 0
            if problem != upstream.problem:
                tell = log.warning if problem else log.info
                tell("upstream %s: %s", upstream.name, problem or "well")
            upstream.problem, upstream.for_operator = problem, for_operator
            self._judge()
            upstream.asked.set()
            if failures == _PATIENCE and len(self.all) > 1:
                upstream.send_away()
            self._closed.wait(self._probe_s * (min(0.1 * 2**failures, 4) if failures else 1))

    def _probe(self, upstream: Upstream) -> tuple[str | None, bool]:
        """What is wrong with it, and whether that is for the operator to mend.

        ``/health`` first: a list of models may be there while the model still loads. vLLM, SGLang,
        LMDeploy, llama-server and this service have both; a server without ``/health`` is judged
        by its list alone.
        """
        exchange = Exchange(time.monotonic() + _PROBE_TIMEOUT_S)
        with self._lock:
            self._probes[upstream] = exchange
            exchange.aborted = self._closed.is_set()
        try:
            with self._alarm.at(exchange.ends, exchange.abort):
                status, _ = self._get(upstream, exchange, "/health")
                if status not in (200, 404):
                    return f"its /health says {status}", status in (401, 403)
                status, body = self._get(upstream, exchange, "/v1/models")
                if status != 200:
                    return f"its /v1/models says {status}", status in (401, 403, 404)
                served = models(body)
                if self._model not in served:
                    return "it does not serve the model that QWENVL_REMOTE_MODEL names", True
                upstream.software = served[self._model]
                return None, False
        except TRANSPORT as error:
            return f"cannot be asked ({type(error).__name__})", False

    def _get(self, upstream: Upstream, exchange: Exchange, path: str) -> tuple[int, bytes]:
        response = exchange.send(upstream.pool, "GET", upstream.base + path, self._headers)
        try:
            body = response.read(_LONGEST_LIST)
            if len(body) == _LONGEST_LIST:
                raise ValueError
            return response.status, body
        finally:
            response.close() if response.length_remaining else response.release_conn()

    def _judge(self) -> None:
        """Make the status of all."""
        problems = [each.problem for each in self.all]
        if None in problems:
            unwell = len(problems) - problems.count(None)
            message = f"{unwell} of {len(problems)} upstreams are unwell" if unwell else "answering"
            phase = Phase.READY
        else:
            # By number: /readyz is open. The log has the names.
            message = "; ".join(f"upstream {n}: {text}" for n, text in enumerate(problems, 1))
            failed = all(each.for_operator for each in self.all)
            phase = Phase.FAILED if failed else Phase.LOADING
        with self._lock:
            before = self._status
            if before.phase is not Phase.DRAINING:
                since = before.since if before.phase is phase else time.monotonic()
                self._status = Status(phase, message, since)
