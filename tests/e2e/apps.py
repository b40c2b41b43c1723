"""Applications with a fake behind them, for gunicorn: ``tests.e2e.apps:app``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

from flask import Flask, Response

from qwenvl_app import create_app
from qwenvl_app.generation import Phase, Status
from qwenvl_app.testing import ScriptedBackend

LOADING_S = float(os.environ.get("FAKE_LOADING_S", "3"))
PIECES = 4
APART_S = 0.3


class SlowBackend(ScriptedBackend):
    """Takes a while to load, as a large model does."""

    def __init__(self) -> None:
        super().__init__("done")
        self.phase = Status(Phase.LOADING, "loading the weights: 3 of 9 tensors")
        threading.Timer(LOADING_S, self._ready).start()

    def _ready(self) -> None:
        self.phase = Status(Phase.READY, "answering")


def _make() -> Flask:
    app = create_app(backend=SlowBackend())

    @app.get("/stream")
    def stream() -> Response:
        """What a streamed answer is to a proxy: pieces with time between them."""

        def pieces() -> Iterator[bytes]:
            for number in range(PIECES):
                yield f"data: {number}\n\n".encode()
                time.sleep(APART_S)

        return Response(pieces(), mimetype="text/event-stream")

    return app


app = _make()
