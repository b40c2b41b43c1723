"""Requests on their way to the engine's thread."""

from __future__ import annotations

import threading
from collections import deque

from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.errors import ServiceError
from qwenvl_app.generation import FinishReason


class Inbox:
    """Any thread puts sequences in, the engine's takes them out."""

    def __init__(self) -> None:
        self._sequences: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._refusal: ServiceError | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def closed(self) -> bool:
        """Whether nothing comes in any more."""
        return self._refusal is not None

    def put(self, sequence: Sequence) -> None:
        """Raises what it was closed with."""
        with self._changed:
            if self._refusal:
                raise self._refusal
            # During a long step those who come and leave would pile up, pictures and all.
            for left in [each for each in self._sequences if each.cancelled]:
                self._sequences.remove(left)
                left.finish(FinishReason.CANCELLED)
            self._sequences.append(sequence)
            self._changed.notify()

    def collect(self, *, wait: bool) -> list[Sequence]:
        """All that came; ``wait`` until there is one, or it is closed."""
        with self._changed:
            while wait and not self._sequences and not self._refusal:
                self._changed.wait()
            collected = list(self._sequences)
            self._sequences.clear()
            return collected

    def close(self, refusal: ServiceError) -> None:
        """Who comes from now on gets ``refusal``."""
        with self._changed:
            self._refusal = refusal
            self._changed.notify()
