"""One thread that calls what is due: a socket's own time-out starts anew with every byte."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Alarm:
    """Calls callbacks at points of ``time.monotonic()``, on its thread. Any thread may ask.

    A callback must not block or raise, and must do no harm a moment after its block.
    """

    def __init__(self, name: str):
        self._changed = threading.Condition()
        self._due: list[tuple[float, int]] = []
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()
        self._closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @contextmanager
    def at(self, when: float, callback: Callable[[], None]) -> Iterator[None]:
        """Have ``callback`` called at ``when``, if the block still runs then."""
        number = next(self._numbers)
        with self._changed:
            self._callbacks[number] = callback
            heapq.heappush(self._due, (when, number))
            if self._due[0][1] == number:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._callbacks.pop(number, None)
                # What is no longer wanted is dropped when it is due, or when it is most of all.
                if len(self._due) > 64 and len(self._due) > 4 * len(self._callbacks):
                    self._due = [entry for entry in self._due if entry[1] in self._callbacks]
                    heapq.heapify(self._due)

    def close(self) -> None:
        """End the thread. Any number of times."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if not self._due:
                    self._changed.wait()
                elif self._due[0][0] > now:
                    self._changed.wait(self._due[0][0] - now)
                elif callback := self._callbacks.pop(heapq.heappop(self._due)[1], None):
                    callback()
