"""The service without a model, as an app for gunicorn that starts in no time.

``FAKE_SECONDS`` is how long an answer takes, ``FAKE_PIECES`` how many of 1 kB it has if it is long;
``FAKE_SECONDS_APART`` lie between them. While the file ``FAKE_HOLD`` is there, none comes.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from flask import request

from qwenvl_app import create_app
from qwenvl_app.generation import GenerationRequest
from qwenvl_app.testing import ScriptedBackend, ScriptedGeneration


class Unheld(threading.Event):
    """Set while nobody holds the answers back."""

    def is_set(self) -> bool:
        return not Path(os.environ.get("FAKE_HOLD", "/nowhere")).exists()


class Forgetful(ScriptedBackend):
    """Keeps none of the pictures that it is asked about: tests look at what the process holds."""

    def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        """See ``ScriptedBackend``."""
        generation = super().generate(request)
        self.requests.clear()
        self.generations.clear()
        return generation


LONG = [f"{number:1000}" for number in range(int(os.environ.get("FAKE_PIECES", "0")))]
backend = Forgetful(*(LONG or ("一个", "答案。")))
backend.delay_s = float(os.environ.get("FAKE_SECONDS", "0"))
backend.apart_s = float(os.environ.get("FAKE_SECONDS_APART", "0"))
backend.go = Unheld()
app = create_app(backend=backend)


@app.post("/age")
def age() -> dict[str, float]:
    """Seconds since the request's first byte."""
    return {"age": time.monotonic() - request.environ["qwenvl.arrived"]}
