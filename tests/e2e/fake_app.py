"""The service without a model, as an app for gunicorn that starts in no time.

``FAKE_SECONDS`` is how long an answer takes; while the file ``FAKE_HOLD`` is there, none comes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from flask import request

from qwenvl_app import create_app
from qwenvl_app.generation import Delta, GenerationRequest
from tests.fakes import FakeBackend, FakeGeneration
from tests.waiting import until


class SlowGeneration(FakeGeneration):
    def __iter__(self) -> Iterator[Delta]:
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        until(lambda: not Path(os.environ.get("FAKE_HOLD", "/nowhere")).exists())
        yield from super().__iter__()


class SlowBackend(FakeBackend):
    def generate(self, request: GenerationRequest) -> FakeGeneration:
        return SlowGeneration(self.pieces, self.go, self.failure, request.deadline)


app = create_app(backend=SlowBackend("一个", "答案。"))


@app.post("/age")
def age() -> dict[str, float]:
    """Seconds since the request's first byte."""
    return {"age": time.monotonic() - request.environ["qwenvl.arrived"]}
