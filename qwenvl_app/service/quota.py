"""What one API key's owner may have in the service at once, so that nobody takes all of it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from qwenvl_app.errors import KeyLimit


class Quota:
    """Counts the requests of each owner, running and waiting. Any thread; ``limit`` 0: no limit."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, owner: str | None) -> Iterator[None]:
        """Count a request of ``owner`` while the block runs; None is nobody's. Raises KeyLimit."""
        if owner is None or not self.limit:
            yield
            return
        with self._lock:
            if self._held[owner] >= self.limit:
                raise KeyLimit
            self._held[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[owner] -= 1
