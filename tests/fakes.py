"""A backend with no model, for everything that is not about the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

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


def prompt_of(request: GenerationRequest) -> str:
    """The last message's text."""
    return "".join(part for part in request.messages[-1].content if isinstance(part, str))


class FakeGeneration:
    """Yields the given pieces; waits for ``go`` before the first one, cancelled or up to it."""

    def __init__(
        self,
        pieces: list[str | Delta],
        go: threading.Event,
        failure: Exception | None,
        deadline: float | None,
    ):
        self.pieces, self.go, self.failure = pieces, go, failure
        self.deadline = deadline or time.monotonic() + 20
        self.cancelled = 0
        self.reason = FinishReason.STOP

    def __iter__(self) -> Iterator[Delta]:
        while not self.go.wait(0.002):
            if self.cancelled:
                yield Delta("", FinishReason.CANCELLED, Usage(10, 0))
                return
            if time.monotonic() >= self.deadline:
                raise DeadlineExceeded
        for piece in self.pieces:
            yield piece if isinstance(piece, Delta) else Delta(piece)
        if self.failure:
            raise self.failure
        yield Delta("", self.reason, Usage(10, len(self.pieces)))

    def cancel(self) -> None:
        self.cancelled += 1


class FakeBackend:
    """Answers with ``pieces``, remembers what it was asked, and fails as it is told to."""

    def __init__(self, *pieces: str | Delta):
        self.pieces = list(pieces)
        self.go = threading.Event()
        self.go.set()
        self.phase = Status(Phase.READY)
        self.failure: Exception | None = None
        self.refusal: ServiceError | None = None
        self.reason = FinishReason.STOP
        self.requests: list[GenerationRequest] = []
        self.generations: list[FakeGeneration] = []

    def status(self) -> Status:
        return self.phase

    def stats(self) -> BackendStats:
        return BackendStats()

    def generate(self, request: GenerationRequest) -> FakeGeneration:
        if self.refusal:
            raise self.refusal
        self.requests.append(request)
        self.generations.append(
            FakeGeneration(self.pieces, self.go, self.failure, request.deadline)
        )
        self.generations[-1].reason = self.reason
        return self.generations[-1]

    def close(self) -> None:
        self.go.set()
