"""Waiting for what another thread or process does; the only loop in the tests that does so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 20, said: Callable[[], Any] = str) -> T:
    """What ``condition`` returns, once that is true; else AssertionError with ``said()``.

    An OSError counts as not yet: nothing listens, or a process in /proc is not there. It is asked
    less and less often, so that it takes no time from what it waits for.
    """
    deadline, pause = time.monotonic() + seconds, 0.001
    while True:
        try:
            if result := condition():
                return result
        except OSError:
            pass
        assert time.monotonic() < deadline, said()
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
