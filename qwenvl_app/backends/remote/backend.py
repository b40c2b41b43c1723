"""Servers that speak OpenAI's API as the backend: one request here is one of theirs."""

from __future__ import annotations

import threading
import time

from qwenvl_app.backends import require_ready
from qwenvl_app.backends.remote.alarm import Alarm
from qwenvl_app.backends.remote.generation import RemoteGeneration
from qwenvl_app.backends.remote.request import body_of
from qwenvl_app.backends.remote.retries import RetryBudget
from qwenvl_app.backends.remote.upstreams import Upstreams
from qwenvl_app.errors import Unavailable
from qwenvl_app.generation import BackendStats, GenerationRequest, Status
from qwenvl_app.settings import Settings
from qwenvl_app.version import VERSION

_PROBE_S = 5.0


class RemoteBackend:
    """See ``backends.Backend``. Starts a thread for each upstream and one for deadlines."""

    def __init__(self, settings: Settings, probe_s: float = _PROBE_S):
        self._settings = settings
        key = settings.remote_api_key.get_secret_value()
        self.headers = {"User-Agent": f"qwenvl/{VERSION}"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.alarm = Alarm("remote-deadlines")
        self.budget = RetryBudget()
        self.upstreams = Upstreams(
            settings.remote_url,
            settings.remote_model,
            self.headers,
            self.alarm,
            settings.max_concurrency,
            probe_s,
        )
        self._lock = threading.Lock()
        self._running: set[RemoteGeneration] = set()

    def status(self) -> Status:
        """See ``backends.Backend``."""
        return self.upstreams.status()

    def stats(self) -> BackendStats:
        """See ``backends.Backend``. What the upstreams know of themselves is theirs to tell."""
        running = sum(upstream.running for upstream in self.upstreams.all)
        return BackendStats(slots=self._settings.max_concurrency, running=running)

    def generate(self, request: GenerationRequest) -> RemoteGeneration:
        """See ``backends.Backend``. Nothing is sent before the generation is iterated."""
        require_ready(self.status())
        began = time.monotonic()
        settings = self._settings
        body = body_of(request, settings.remote_model, settings.max_new_tokens)
        self.budget.earn()
        ends = request.deadline or began + settings.request_timeout_s
        return RemoteGeneration(self, request, body, began, ends)

    def close(self) -> None:
        """See ``backends.Backend``."""
        self.upstreams.close()
        with self._lock:
            running = list(self._running)
        for generation in running:
            generation.stop(Unavailable.stopping())
        self.alarm.close()

    def enter(self, generation: RemoteGeneration) -> None:
        """It runs, and ends when the backend is closed."""
        with self._lock:
            self._running.add(generation)

    def leave(self, generation: RemoteGeneration) -> None:
        """It has ended."""
        with self._lock:
            self._running.discard(generation)
