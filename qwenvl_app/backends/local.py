"""The model in this process: loaded once, in the background, then handed to the engine."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

from qwenvl_app import process
from qwenvl_app.backends import Generation, require_ready
from qwenvl_app.errors import LoadStopped, ModelLoadError, Unavailable, is_out_of_memory
from qwenvl_app.generation import BackendStats, GenerationRequest, Phase, Status
from qwenvl_app.settings import Settings

if TYPE_CHECKING:
    from qwenvl_app.engine.engine import Engine
    from qwenvl_app.engine.model import LoadedModel
    from qwenvl_app.loading.plan import MemoryPlan

log = logging.getLogger(__name__)

_LINES_APART_S = 5
_LONGEST_END_S = 10  # one step of a load may take minutes: it is not waited for
_UNEXPECTED = "an unexpected error while loading; the log has it"
_OUT = (
    "the memory ran out while loading: something else takes what was free, or the doctor "
    "(flask --app wsgi doctor) says what would fit; else use a smaller or a quantised checkpoint"
)


# Those that nobody has closed when the process ends, as after ``flask routes``: see ``close``.
_open: weakref.WeakSet[LocalBackend] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for backend in list(_open):
        backend.close()


class LocalBackend:
    """See ``backends.Backend``."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._status = Status(Phase.LOADING, "looking for the checkpoint")
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._next_line = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="local-backend", daemon=True)
        _open.add(self)
        self._thread.start()

    def status(self) -> Status:
        """See ``backends.Backend``. FAILED too while one step takes longer than it may."""
        if (engine := self._engine) is None:
            return self._status
        return engine.failure or self._stalled(engine) or self._status

    def stats(self) -> BackendStats:
        """See ``backends.Backend``."""
        engine = self._engine
        return engine.stats() if engine else BackendStats()

    def generate(self, request: GenerationRequest) -> Generation:
        """See ``backends.Backend``."""
        require_ready(self.status())
        with self._lock:
            engine = self._engine
        if engine is None:  # closed since the line above
            raise Unavailable.stopping()
        return engine.submit(request)

    def close(self) -> None:
        """See ``backends.Backend``. A load ends where it next says how far it is."""
        with self._lock:
            self._status = Status.draining()
            engine, self._engine = self._engine, None
        self._closed.set()
        if engine:
            engine.close()
        # A process that ends while a thread of it is in torch, as it is for seconds while that is
        # imported, may be aborted instead ("FATAL: exception not rethrown").
        if self._thread is not threading.current_thread():
            self._thread.join(_LONGEST_END_S)

    def _stalled(self, engine: Engine) -> Status | None:
        began, limit = engine.step_began, self._settings.stall_timeout_s
        if began is None or (spent := time.monotonic() - began) <= limit:
            return None
        return Status(
            Phase.FAILED, f"the engine has made no progress for {spent:.0f} s", began + limit
        )

    # From here on: the backend's own thread.

    def _run(self) -> None:
        """Load, then look now and then whether the engine still moves, whoever asks or not."""
        self._load()
        stalled = False
        while not self._closed.wait(min(1.0, self._settings.stall_timeout_s / 4)):
            engine = self._engine
            status = self._stalled(engine) if engine else None
            if status and not stalled:
                log.critical("%s; if this lasts, restart the service", status.message)
            elif stalled and not status:
                log.warning("the engine makes progress again")
            stalled = status is not None

    def _prepare(self) -> tuple[LoadedModel, MemoryPlan]:
        # Not at the top: importing torch and transformers takes seconds, in which /livez is to
        # answer already, and a checkpoint that is none is told before.
        from qwenvl_app.loading import checkpoint

        settings = self._settings
        self._say("looking for the checkpoint")
        found = checkpoint.find(settings.model, say=self._say)
        self._say("loading the libraries")
        from qwenvl_app.loading import devices, load

        process.use_threads(settings.cpu_threads)
        plan = devices.before_loading(found, settings)
        loaded = load.load(
            found,
            device=settings.device,
            dtype=settings.dtype,
            attention=settings.attention,
            max_memory=plan.max_memory,
            say=self._say,
        )
        loaded = load.optimise(
            loaded,
            cpp=settings.compile != "off",
            room=devices.spare(plan),
            cpu_threads=settings.cpu_threads,
        )
        return loaded, devices.after_loading(loaded, plan, self._say)

    def _start(self) -> Engine:
        loaded, plan = self._prepare()
        from qwenvl_app.engine import engine as engines
        from qwenvl_app.loading import devices, warm_up

        settings = self._settings
        compiled = settings.compile == "on" and not loaded.native.text
        options = engines.EngineOptions(
            slots=settings.max_concurrency,
            max_new_tokens=settings.max_new_tokens,
            kv_cache_bytes=plan.kv_cache,
            prefix_cache_bytes=plan.prefix_cache,
            prefill_chunk=settings.prefill_chunk,
            patch_tokens=plan.patch,
            compile=settings.compile,
        )
        engine = engines.Engine(loaded, options)
        try:
            self._say("compiling, for a minute or two" if compiled else "warming up")
            warm_up.warm_up(engine)
        except BaseException as error:
            engine.close()
            if compiled and isinstance(error, ModelLoadError):  # it was warmed up in vain
                hint = "or compiling it fails: set QWENVL_COMPILE=off"
                raise ModelLoadError(f"{error}; {hint}") from None
            raise
        devices.tell_process(plan)
        process.keep_objects()
        return engine

    def _say(self, message: str) -> None:
        """Tell how far the loading is: in the status at once, in the log now and then."""
        if self._closed.is_set():
            raise LoadStopped
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
        except ModuleNotFoundError as error:  # requirements-remote.txt has no torch
            log.error("the package %s is missing", error.name)
            status = Status(Phase.FAILED, f"{error.name} is missing: install requirements.txt")
        except LoadStopped:
            return
        except BaseException as error:  # a library's SystemExit too, or it would load for ever
            log.exception("the model can't be loaded")
            status = Status(Phase.FAILED, _OUT if is_out_of_memory(error) else _UNEXPECTED)
        with self._lock:
            if self._status.phase is Phase.LOADING:
                self._status, self._engine, engine = status, engine, None
        if engine:  # closed while it was loading
            engine.close()
