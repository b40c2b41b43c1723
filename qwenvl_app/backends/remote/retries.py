"""How often requests may be sent again."""

from __future__ import annotations

import threading

# Retries that may be saved up, and what each request adds: when all fails, asking three times as
# often makes it worse (finagle, RetryBudget).
_BUDGET, _EARNED = 10.0, 0.2


class RetryBudget:
    """How many requests may be sent again. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = _BUDGET

    def earn(self) -> None:
        """A new request."""
        with self._lock:
            self._left = min(_BUDGET, self._left + _EARNED)

    def spend(self) -> bool:
        """Whether one more may be sent again."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True
