"""The service without a model, as an app for gunicorn that starts in no time.

``FAKE_SECONDS`` is how long an answer takes.
"""

from __future__ import annotations

import os
import time

from flask import request

from qwenvl_app import create_app
from tests.fakes import FakeBackend

backend = FakeBackend("一个", "答案。")
backend.delay_s = float(os.environ.get("FAKE_SECONDS", "0"))
app = create_app(backend=backend)


@app.post("/age")
def age() -> dict[str, float]:
    """Seconds since the request's first byte."""
    return {"age": time.monotonic() - request.environ["qwenvl.arrived"]}
