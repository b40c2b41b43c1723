"""A backend generates text for a request. The app knows it by this protocol only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from qwenvl_app.errors import InternalError, Unavailable
from qwenvl_app.generation import BackendStats, Delta, GenerationRequest, Phase, Status
from qwenvl_app.settings import Settings


class Generation(Protocol):
    """One answer on its way. Iterated by one thread; the last delta has a finish reason."""

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they are generated. Raises ServiceError if the answer can't be finished."""

    def cancel(self) -> None:
        """Stop generating soon. Any thread, any number of times, after the end too."""


class Backend(Protocol):
    """Generates answers. All methods may be called on any thread."""

    def status(self) -> Status:
        """Never blocks."""

    def stats(self) -> BackendStats:
        """What is under way. Never blocks, never fails."""

    def generate(self, request: GenerationRequest) -> Generation:
        """Prepare the request on the calling thread and queue it. Raises ServiceError."""

    def close(self) -> None:
        """End every request and thread. Any number of times."""


def build(settings: Settings) -> Backend:
    """The backend that the settings ask for. Loading goes on in the background."""
    if settings.backend == "remote":
        from qwenvl_app.backends.remote.backend import RemoteBackend

        return RemoteBackend(settings)
    from qwenvl_app.backends.local import LocalBackend

    return LocalBackend(settings)


def require_ready(status: Status) -> None:
    """Raise the ServiceError that a request gets while a backend is not ready."""
    if status.phase is Phase.LOADING:
        raise Unavailable("模型正在加载，请稍后重试。", retry_after=10, reason="loading")
    if status.phase is Phase.DRAINING:
        raise Unavailable.stopping()
    if status.phase is Phase.FAILED:
        raise InternalError("模型加载失败或已停止工作，请联系管理员。", reason="model_failed")
