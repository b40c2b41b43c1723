"""Admission: a semaphore with a waiting room of bounded size and bounded patience."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qwenvl_app.errors import Unavailable

_BUSY = "服务器繁忙，请稍后重试。"


class Admission:
    """Hands out ``permits``, first come first served. All methods may be called on any thread."""

    def __init__(self, permits: int, max_waiting: int, timeout_s: float):
        self.permits, self.max_waiting, self.timeout_s = permits, max_waiting, timeout_s
        self._lock = threading.Lock()
        self._free = permits
        self._queue: deque[threading.Event] = deque()

    @property
    def free(self) -> int:
        """Permits that nobody holds; equal to ``permits`` when idle."""
        return self._free

    @property
    def waiting(self) -> int:
        """Requests in the waiting room."""
        return len(self._queue)

    @contextmanager
    def admit(self) -> Iterator[float]:
        """Hold a permit while the block runs; yields the seconds spent waiting for it.

        Raises Unavailable when the waiting room is full, or when no permit came in time.
        """
        waited = self._acquire()
        try:
            yield waited
        finally:
            self._release()

    def _acquire(self) -> float:
        with self._lock:
            if self._free and not self._queue:
                self._free -= 1
                return 0.0
            if len(self._queue) >= self.max_waiting:
                raise Unavailable(_BUSY, retry_after=self._patience())
            turn = threading.Event()
            self._queue.append(turn)
        began = time.monotonic()
        if not turn.wait(self.timeout_s):
            with self._lock:
                # A permit may have been handed over between the time-out and the lock.
                if not turn.is_set():
                    self._queue.remove(turn)
                    raise Unavailable(_BUSY, retry_after=self._patience())
        return time.monotonic() - began

    def _release(self) -> None:
        with self._lock:
            if self._queue:  # handed over directly, so that nobody can jump the queue
                self._queue.popleft().set()
            else:
                self._free += 1

    def _patience(self) -> int:
        return max(1, round(self.timeout_s / 4))
