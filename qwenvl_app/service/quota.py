"""What one API key's owner may have in the service at once, so that nobody takes all of it."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwenvl_app.errors import KeyLimit
from qwenvl_app.sharing import Lock

_MOST = 2**20  # requests of one owner, for which there are places


class Quota:
    """Counts the requests of each owner, running and waiting. Any thread; ``limit`` 0: no limit.

    In all workers that share ``directory``; None: in this process.
    """

    def __init__(self, limit: int, directory: Path | None = None):
        self.limit, self._directory = limit, directory
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, owner: str | None) -> Iterator[None]:
        """Count a request of ``owner`` while the block runs; None is nobody's. Raises KeyLimit."""
        if owner is None or not self.limit:
            yield
        elif self._directory:
            with self._place(owner, self._directory):
                yield
        else:
            with self._count(owner):
                yield

    @contextmanager
    def _count(self, owner: str) -> Iterator[None]:
        with self._lock:
            if self._held[owner] >= self.limit:
                raise KeyLimit
            self._held[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[owner] -= 1

    @contextmanager
    def _place(self, owner: str, directory: Path) -> Iterator[None]:
        """One of the owner's ``limit`` places. Whatever kills a worker frees those it had."""
        hashed = hashlib.blake2b(owner.encode(), digest_size=5).digest()
        first = int.from_bytes(hashed, "big") * _MOST + 1
        lock = Lock(directory)
        try:
            if not any(lock.take(first + number) for number in range(self.limit)):
                raise KeyLimit
            yield
        finally:
            lock.give_back()
