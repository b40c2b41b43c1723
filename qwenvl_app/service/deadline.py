"""Until when a client waits for its answer, and whether it still does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qwenvl_app.errors import ClientGone, DeadlineExceeded


class Deadline:
    """The end of one request: its time is up or its client has gone. Any thread.

    ``at`` is a point of ``time.monotonic()``. It is looked at between the stages of a request; a
    stage that waits is interrupted by ``on_leaving`` and its own time-out.
    """

    def __init__(self, at: float):
        self.at = at
        self._lock = threading.Lock()
        self._gone = False
        self._callback: Callable[[], None] | None = None

    @property
    def gone(self) -> bool:
        """Whether the client has closed its connection."""
        return self._gone

    @property
    def remaining(self) -> float:
        """Seconds that are left; 0 when the time is up."""
        return max(0.0, self.at - time.monotonic())

    @property
    def wants_answer(self) -> bool:
        """Whether there is any use in working for this client."""
        return not self._gone and self.remaining > 0

    def check(self) -> None:
        """Raise ClientGone or DeadlineExceeded if nobody wants the answer any more."""
        if self._gone:
            raise ClientGone
        if not self.remaining:
            raise DeadlineExceeded

    def leave(self) -> None:
        """The client has gone: interrupts what is waited for."""
        with self._lock:
            self._gone, callback = True, self._callback
        if callback:
            callback()

    @contextmanager
    def on_leaving(self, callback: Callable[[], None]) -> Iterator[None]:
        """Have ``callback`` called, on another thread, if the client goes while the block runs.

        At once and on this thread if it has gone already. It must not block, and must do no harm
        a moment after the block either. Blocks don't nest.
        """
        with self._lock:
            self._callback, gone = callback, self._gone
        try:
            if gone:
                callback()
            yield
        finally:
            with self._lock:
                self._callback = None
