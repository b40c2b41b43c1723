"""The service without a model, as an app for gunicorn that starts in no time.

``FAKE_SECONDS`` is how long an answer takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from flask import request

from qwenvl_app import create_app
from qwenvl_app.generation import Delta, GenerationRequest, Phase, Status
from tests.fakes import FakeBackend, FakeGeneration


class SlowGeneration(FakeGeneration):
    def __iter__(self) -> Iterator[Delta]:
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        yield from super().__iter__()


class SlowBackend(FakeBackend):
    def generate(self, request: GenerationRequest) -> FakeGeneration:
        return SlowGeneration(self.pieces, self.go, self.failure)


backend = SlowBackend("一个", "答案。")
app = create_app(backend=backend)


@app.post("/age")
def age() -> dict[str, float]:
    """Seconds since the request's first byte."""
    return {"age": time.monotonic() - request.environ["qwenvl.arrived"]}


if "drain" not in app.extensions["qwenvl"]:
    app.extensions["qwenvl"]["drain"] = lambda: setattr(backend, "phase", Status(Phase.DRAINING))
