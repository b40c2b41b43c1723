"""What became of one request: filled in while it is answered, then counted and logged once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qwenvl_app.generation import Delta, FinishReason, Timings, Usage


@dataclass
class RequestRecord:
    """One request's account, kept by the thread that answers it. Times are ``time.monotonic()``.

    ``intervals``: what this thread did, and from when to when: read, fetch, queue, image. What the
    backend says of its own part comes with the last delta. ``reason``: why there is no answer.
    ``key``: the name of the API key, where keys are asked for.
    """

    arrived: float = field(default_factory=time.monotonic)
    intervals: list[tuple[str, float, float]] = field(default_factory=list)
    pixels: int | None = None
    submitted: float | None = None  # when the backend got it
    usage: Usage | None = None
    timings: Timings | None = None
    finish_reason: FinishReason | None = None
    reason: str | None = None
    key: str | None = None

    @property
    def age(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived

    @property
    def stages(self) -> dict[str, float]:
        """Seconds that this thread spent, by stage."""
        spent: dict[str, float] = {}
        for name, began, ended in self.intervals:
            spent[name] = spent.get(name, 0.0) + ended - began
        return spent

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time, however it ends, as the stage ``name``."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.intervals.append((name, began, time.monotonic()))

    def waited(self, name: str, seconds: float) -> None:
        """Count the ``seconds`` until now as the stage ``name``."""
        now = time.monotonic()
        self.intervals.append((name, now - seconds, now))

    def submit(self) -> None:
        """The backend gets it now."""
        self.submitted = time.monotonic()

    def add(self, delta: Delta) -> str:
        """Note what the last delta says; returns the delta's text."""
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.usage, self.timings = delta.usage, delta.timings
        return delta.text
