"""The service without a model, as an app for gunicorn that starts in no time.

``FAKE_SECONDS`` is how long an answer takes, ``FAKE_PIECES`` how many of 1 kB it has if it is long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from flask import request

from qwenvl_app import create_app
from qwenvl_app.generation import Delta, GenerationRequest
from tests.fakes import FakeBackend, FakeGeneration


class SlowGeneration(FakeGeneration):
    def __iter__(self) -> Iterator[Delta]:
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        yield from super().__iter__()


class SlowBackend(FakeBackend):
    def generate(self, request: GenerationRequest) -> FakeGeneration:
        return SlowGeneration(self.pieces, self.go, self.failure, request.deadline)


LONG = [f"{number:1000}" for number in range(int(os.environ.get("FAKE_PIECES", "0")))]
app = create_app(backend=SlowBackend(*(LONG or ("一个", "答案。"))))


@app.post("/age")
def age() -> dict[str, float]:
    """Seconds since the request's first byte."""
    return {"age": time.monotonic() - request.environ["qwenvl.arrived"]}
