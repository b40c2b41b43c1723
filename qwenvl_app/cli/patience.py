"""When to ask again: a server that is busy, restarting, or has failed at one question."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

from qwenvl_app.cli.answers import Answer, Broken, Failed, Refused
from qwenvl_app.cli.client import Client, Picture

_BUSY = frozenset((429, 502, 503))  # 502 is what nginx says while the service restarts
_AGAIN = frozenset((408, 500, 504))
_USELESS = frozenset((401, 403, 404, 405))  # they would be the same for every picture
_TIMES = 3
_BREAKS = 5
_FIRST_S, _LONGEST_S = 0.5, 15.0
_LONGEST_ASKED_S = 120  # of what a server may ask for in Retry-After


class Patience:
    """Asks until there is an answer, or it is sure that none will come. Any thread.

    ``seconds``: how long a server that is busy or away is waited for, by all threads together.
    Setting ``stop`` ends all waiting.
    """

    def __init__(self, client: Client, seconds: float, stop: threading.Event):
        self._client, self._seconds, self._stop = client, seconds, stop
        self._heard = time.monotonic()

    def ask(self, picture: Picture, prompt: str) -> Answer:
        """An answer. Raises Refused or Broken for this picture, Failed for the whole batch."""
        began, waits = time.monotonic(), _growing()
        left = {Refused: _TIMES, Broken: _BREAKS}
        while True:
            asked = 0
            try:
                answer = self._client.ask(picture, prompt)
                self._heard = time.monotonic()
                return answer
            except Refused as refused:
                error: Refused | Broken = refused
                asked = min(refused.retry_after or 0, _LONGEST_ASKED_S)
                if refused.status not in _BUSY:
                    self._heard = time.monotonic()
                    left[Refused] -= 1
                    self._judge(refused, left[Refused])
            except Broken as broken:
                error = broken
                left[Broken] -= broken.sent  # a picture may be what brings the server down
                if left[Broken] <= 0 and self._phase()[0] == "ready":
                    raise
            self._check(began, error)
            self._stop.wait((asked or next(waits)) * random.uniform(1, 1.2))  # not all at once
            if self._stop.is_set():
                raise error

    def slots(self) -> int:
        """Wait for the server to be there; how many answers it writes at once, 0 if unknown.

        Raises Failed.
        """
        began, waits = time.monotonic(), _growing()
        while True:
            try:
                phase, message = self._client.status()
                slots = self._client.slots()
                if phase != "loading":
                    return slots
                error: Exception = Refused(None, message)
            except Broken as broken:
                error = broken
            self._check(began, error)
            self._stop.wait(next(waits))

    def _judge(self, error: Refused, left: int) -> None:
        if error.status in _USELESS:
            raise Failed(f"{self._client.url}: {error}") from None
        if error.status not in _AGAIN:
            raise error
        if not left:
            self._check_model(error)
            raise error

    def _check_model(self, error: Refused) -> None:
        """A model that has failed fails at every picture."""
        phase, message = self._phase()
        if phase == "failed":
            raise Failed(f"{self._client.url}: {message or error}") from None

    def _phase(self) -> tuple[str, str]:
        try:
            return self._client.status()
        except Broken:
            return "", ""

    def _check(self, began: float, error: Exception) -> None:
        now = time.monotonic()
        if now - self._heard > self._seconds:
            said = f"no answer from {self._client.url} in {self._seconds:.0f} s: {error}"
            raise Failed(said) from None
        if now - began > self._seconds:  # others are answered
            raise error


def _growing() -> Iterator[float]:
    seconds = _FIRST_S
    while True:
        yield seconds
        seconds = min(2 * seconds, _LONGEST_S)
