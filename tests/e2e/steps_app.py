"""The service with a backend that makes a piece only when it is told to: no clock is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from flask import Response, jsonify

from qwenvl_app import create_app
from qwenvl_app.generation import Delta, FinishReason, GenerationRequest, Usage
from qwenvl_app.testing import ScriptedBackend, ScriptedGeneration

PIECES = ("一", "二", "三")
_steps = threading.Semaphore(0)


class Stepped(ScriptedGeneration):
    def __iter__(self) -> Iterator[Delta]:
        for piece in self.pieces:
            while not _steps.acquire(timeout=0.01):
                if self.cancelled:
                    yield Delta("", FinishReason.CANCELLED, Usage(10, 0))
                    return
            yield Delta(piece)
        yield Delta("", FinishReason.STOP, Usage(10, len(self.pieces)))


class SteppedBackend(ScriptedBackend):
    def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        self.generations.append(Stepped(self, self.pieces, request.deadline))
        return self.generations[-1]


backend = SteppedBackend(*PIECES)
app = create_app(backend=backend)


@app.post("/step")
def step() -> str:
    """Let one piece be made."""
    _steps.release()
    return ""


@app.get("/debug")
def debug() -> Response:
    """What is held for requests that are under way, and how often each was cancelled."""
    parts = app.extensions["qwenvl"]
    return jsonify(
        taken=parts["admission"].permits - parts["admission"].free,
        watched=parts["disconnects"].watched,
        cancelled=[generation.cancelled for generation in backend.generations],
    )
