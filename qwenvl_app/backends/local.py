"""The model in this process: loaded once, in the background, then handed to the engine."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import TYPE_CHECKING

from qwenvl_app.backends import Generation, require_ready
from qwenvl_app.errors import ModelLoadError, Unavailable
from qwenvl_app.generation import BackendStats, GenerationRequest, Phase, Status
from qwenvl_app.settings import Settings

if TYPE_CHECKING:
    from qwenvl_app.engine.engine import Engine

log = logging.getLogger(__name__)

_LINES_APART_S = 5


class LocalBackend:
    """See ``backends.Backend``."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._status = Status(Phase.LOADING, "loading the libraries")
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._next_line = 0.0
        threading.Thread(target=self._load, name="loader", daemon=True).start()

    def status(self) -> Status:
        """See ``backends.Backend``."""
        if (engine := self._engine) is not None and (failure := engine.failure):
            return failure
        return self._status

    def stats(self) -> BackendStats:
        """See ``backends.Backend``."""
        engine = self._engine
        return engine.stats() if engine else BackendStats()

    def generate(self, request: GenerationRequest) -> Generation:
        """See ``backends.Backend``."""
        require_ready(self._status)
        with self._lock:
            engine = self._engine
        if engine is None:  # closed since the line above
            raise Unavailable.stopping()
        return engine.submit(request)

    def close(self) -> None:
        """See ``backends.Backend``. A load that is under way is left to end by itself."""
        with self._lock:
            self._status = Status(Phase.DRAINING, "the service is stopping")
            engine, self._engine = self._engine, None
        if engine:
            engine.close()

    def _start(self) -> Engine:
        # Not at the top: importing torch and transformers takes seconds, in which /livez is to
        # answer already.
        from qwenvl_app.engine import cpu, memory, model
        from qwenvl_app.engine import engine as engines

        settings = self._settings
        cpu.use_threads(settings.cpu_threads)
        loaded = model.load(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            attention=settings.attention,
            say=self._say,
        )
        cpu.pack(loaded.model)
        options = engines.EngineOptions(
            slots=settings.max_concurrency,
            max_new_tokens=settings.max_new_tokens,
            kv_cache_bytes=settings.kv_cache_mb * 2**20
            or memory.free_memory(loaded.model.device) // 2,
            prefix_cache_bytes=settings.prefix_cache_mb * 2**20,
            prefill_chunk=settings.prefill_chunk,
        )
        return engines.Engine(loaded, options)

    def _say(self, message: str) -> None:
        """Tell how far the loading is: in the status at once, in the log now and then."""
        with self._lock:
            if self._status.phase is Phase.LOADING:
                self._status = dataclasses.replace(self._status, message=message)
        if (now := time.monotonic()) >= self._next_line:
            self._next_line = now + _LINES_APART_S
            log.info("%s", message)

    def _load(self) -> None:
        engine: Engine | None = None
        try:
            engine = self._start()
            status = Status(Phase.READY, "answering")
            log.info("the model is ready")
        except ModelLoadError as error:
            log.error("the model can't be loaded: %s", error)
            status = Status(Phase.FAILED, str(error))
        except Exception:
            log.exception("the model can't be loaded")
            status = Status(Phase.FAILED, "an unexpected error while loading; the log has it")
        with self._lock:
            if self._status.phase is Phase.LOADING:
                self._status, self._engine, engine = status, engine, None
        if engine:  # closed while it was loading
            engine.close()
