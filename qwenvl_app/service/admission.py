"""Admission: a semaphore with a waiting room of bounded size and bounded patience."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qwenvl_app.errors import Unavailable
from qwenvl_app.generation import Status
from qwenvl_app.service.deadline import Deadline

_GUESS_S = 5.0  # how long a permit is held, before any was
_WEIGHT = 0.2  # of the latest permit in the mean
_LONGEST_RETRY_S = 60  # one that is told to wait for longer does not come back


class _Turn:
    """A place in the queue. Whoever takes it out of the queue says whether it got a permit."""

    def __init__(self, deadline: Deadline):
        self.deadline = deadline
        self.granted = False
        self.settled = threading.Event()


class Admission:
    """Hands out ``permits``, first come first served. All methods may be called on any thread.

    Under the lock, and so for everyone: a permit is free only if nobody waits; a turn is settled
    exactly when it leaves the queue.
    """

    def __init__(self, permits: int, max_waiting: int, timeout_s: float):
        self.permits, self.max_waiting, self.timeout_s = permits, max_waiting, timeout_s
        self._lock = threading.Lock()
        self._free = permits
        self._queue: deque[_Turn] = deque()
        self._mean_held: float | None = None
        self._draining: Status | None = None

    @property
    def free(self) -> int:
        """Permits that nobody holds; equal to ``permits`` when idle."""
        return self._free

    @property
    def waiting(self) -> int:
        """Requests in the waiting room."""
        return len(self._queue)

    @property
    def draining(self) -> Status | None:
        """The status of the service once ``drain`` was called."""
        return self._draining

    @contextmanager
    def admit(self, deadline: Deadline) -> Iterator[float]:
        """Hold a permit while the block runs; yields the seconds spent waiting for it.

        Raises Unavailable when the waiting room is full, when no permit came within the time-out,
        or when draining; DeadlineExceeded or ClientGone when the time was up or the client left
        while it waited: it has lost its place at that moment, and never takes a permit.
        """
        waited = self._acquire(deadline)
        began = time.monotonic()
        try:
            yield waited
            # Not after an error: damaged pictures are quick, and tell nothing of what answers take.
            self._measure(time.monotonic() - began)
        finally:
            self._release()

    def drain(self) -> None:
        """Refuse all who wait and all who come from now on; those with a permit keep it.

        Never blocks; any number of times.
        """
        with self._lock:
            self._draining = self._draining or Status.draining()
            while self._queue:
                self._queue.popleft().settled.set()

    def _acquire(self, deadline: Deadline) -> float:
        with self._lock:
            deadline.check()
            if self._draining:
                raise Unavailable.stopping()
            if self._free:
                self._free -= 1
                return 0.0
            if len(self._queue) >= self.max_waiting:
                raise self._busy("queue_full")
            turn = _Turn(deadline)
            self._queue.append(turn)
        began = time.monotonic()
        with deadline.on_leaving(lambda: self._give_up(turn)):
            turn.settled.wait(min(self.timeout_s, deadline.remaining))
        self._give_up(turn)  # unless it was settled meanwhile
        if turn.granted:
            return time.monotonic() - began
        deadline.check()
        raise Unavailable.stopping() if self._draining else self._busy("queue_timeout")

    def _give_up(self, turn: _Turn) -> None:
        with self._lock:
            if not turn.settled.is_set():
                self._queue.remove(turn)
                turn.settled.set()

    def _measure(self, held: float) -> None:
        with self._lock:
            mean = held if self._mean_held is None else self._mean_held
            self._mean_held = mean + _WEIGHT * (held - mean)

    def _release(self) -> None:
        with self._lock:
            while self._queue:  # handed over directly, so that nobody can jump the queue
                turn = self._queue.popleft()
                turn.granted = turn.deadline.wants_answer
                turn.settled.set()
                if turn.granted:
                    return
            self._free += 1

    def _busy(self, reason: str) -> Unavailable:
        """Come back when those who are here now will have been served, by what was measured."""
        held = _GUESS_S if self._mean_held is None else self._mean_held
        wait = held * (len(self._queue) + 1) / self.permits
        return Unavailable(
            "服务器繁忙，请稍后重试。",
            retry_after=min(max(1, math.ceil(wait)), _LONGEST_RETRY_S),
            reason=reason,
        )
