"""For tests of programs that ask this service: a scripted backend, and fixtures for pytest.

No model, no torch, an answer in a millisecond. In a ``conftest.py``::

    pytest_plugins = ["qwenvl_app.testing"]

The fixtures are ``qwenvl_backend``, a ``ScriptedBackend`` whose script the test may change;
``qwenvl_app``, the Flask application around it; ``qwenvl_client``, Flask's test client of it; and
``qwenvl_url``, the address of the application on a real socket of 127.0.0.1, for any program.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.serving import make_server

from qwenvl_app import create_app
from qwenvl_app.errors import DeadlineExceeded, ServiceError
from qwenvl_app.generation import (
    BackendStats,
    Delta,
    FinishReason,
    GenerationRequest,
    Phase,
    Status,
    Usage,
)
from qwenvl_app.settings import load_settings

__all__ = ["ScriptedBackend", "ScriptedGeneration", "prompt_of"]

_LONGEST_S = 20.0  # that an answer is held, if its request has no deadline


def prompt_of(request: GenerationRequest) -> str:
    """The text of the last message."""
    return "".join(part for part in request.messages[-1].content if isinstance(part, str))


class ScriptedBackend:
    """Answers every request with ``pieces``, texts or deltas, and does what its attributes say.

    ``answer``: a function from a request to its pieces; None: ``pieces``, whatever is asked.
    ``delay_s``: seconds before the first piece, and ``apart_s`` before each other one.
    ``finish_reason``: why the answer ends.
    ``go``: cleared, answers are held before their first piece until it is set, for tests of
    time-outs and of a busy service.
    ``phase``: what ``/readyz`` tells. ``refusal`` is raised before generation, ``failure`` after
    the last piece: a ``ServiceError``, or any other exception for a failure inside the service.
    ``requests`` and ``generations``: what it was asked, in order; the test reads them.
    """

    def __init__(self, *pieces: str | Delta):
        self.pieces: list[str | Delta] = list(pieces)
        self.answer: Callable[[GenerationRequest], Sequence[str | Delta]] | None = None
        self.delay_s = self.apart_s = 0.0
        self.finish_reason = FinishReason.STOP
        self.go = threading.Event()
        self.go.set()
        self.phase = Status(Phase.READY)
        self.refusal: ServiceError | None = None
        self.failure: Exception | None = None
        self.requests: list[GenerationRequest] = []
        self.generations: list[ScriptedGeneration] = []

    def status(self) -> Status:
        """As scripted."""
        return self.phase

    def stats(self) -> BackendStats:
        """Nothing is known."""
        return BackendStats()

    def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        """Note the request and answer it. Raises ``refusal``."""
        if self.refusal:
            raise self.refusal
        self.requests.append(request)
        pieces = self.answer(request) if self.answer else self.pieces
        self.generations.append(ScriptedGeneration(self, pieces, request.deadline))
        return self.generations[-1]

    def close(self) -> None:
        """Let every answer that is held go on."""
        self.go.set()


class ScriptedGeneration:
    """One answer. ``cancelled`` counts how often the service gave it up or let it go."""

    def __init__(
        self, backend: ScriptedBackend, pieces: Sequence[str | Delta], deadline: float | None
    ):
        self._backend, self.pieces = backend, pieces
        self._deadline = deadline or time.monotonic() + _LONGEST_S
        self.cancelled = 0

    def __iter__(self) -> Iterator[Delta]:
        """The pieces as deltas. Raises DeadlineExceeded, and the backend's ``failure``."""
        backend, written = self._backend, 0
        for piece in self.pieces or [""]:
            if not self._wait(backend.apart_s if written else backend.delay_s):
                yield Delta("", FinishReason.CANCELLED, Usage(10, written))
                return
            yield piece if isinstance(piece, Delta) else Delta(piece)
            written += 1
        if backend.failure:
            raise backend.failure
        yield Delta("", backend.finish_reason, Usage(10, written))

    def cancel(self) -> None:
        """End it soon."""
        self.cancelled += 1

    def _wait(self, seconds: float) -> bool:
        """Whether a piece is due; False: cancelled. Raises DeadlineExceeded."""
        until = time.monotonic() + seconds
        while not self._backend.go.is_set() or time.monotonic() < until:
            if self.cancelled:
                return False
            if time.monotonic() >= self._deadline:
                raise DeadlineExceeded
            time.sleep(0.002)
        return True


@pytest.fixture
def qwenvl_backend() -> ScriptedBackend:
    """The script: "A scripted answer." until the test changes it."""
    return ScriptedBackend("A scripted", " answer.")


@pytest.fixture
def qwenvl_app(qwenvl_backend: ScriptedBackend) -> Iterator[Flask]:
    """The application, with the default settings and none of the environment's."""
    app = create_app(load_settings({}), qwenvl_backend)
    yield app
    app.extensions["qwenvl"]["close"]()


@pytest.fixture
def qwenvl_client(qwenvl_app: Flask) -> FlaskClient:
    """Flask's test client."""
    return qwenvl_app.test_client()


@pytest.fixture
def qwenvl_url(qwenvl_app: Flask) -> Iterator[str]:
    """``http://127.0.0.1:PORT``, on a free port, with a thread a request."""
    server = make_server("127.0.0.1", 0, qwenvl_app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
