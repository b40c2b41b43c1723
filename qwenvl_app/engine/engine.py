"""The engine: one thread, the only one that touches the model, decodes all requests together."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import torch

from qwenvl_app.engine.executor import FAILED, Executor, Outcome
from qwenvl_app.engine.inbox import Inbox
from qwenvl_app.engine.intake import Intake
from qwenvl_app.engine.memory import gpu_memory
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.prefix_cache import PrefixCache
from qwenvl_app.engine.runner import Mode, Runner
from qwenvl_app.engine.scheduler import Scheduler, Step
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.errors import (
    DeadlineExceeded,
    InternalError,
    ModelLoadError,
    ServiceError,
    Unavailable,
    is_out_of_memory,
)
from qwenvl_app.generation import BackendStats, FinishReason, GenerationRequest, Phase, Status

log = logging.getLogger(__name__)

_MAX_FAILURES = 3  # without one good answer between them: it is not the requests that are at fault
_LEAST_TOKENS = 128  # of KV cache, to be of any use
_PATIENCE_S = 10.0  # for the last step, when closing


@dataclass(frozen=True)
class EngineOptions:
    """Sizes. ``kv_cache_bytes`` and ``prefix_cache_bytes`` are of the device's memory."""

    slots: int
    max_new_tokens: int
    kv_cache_bytes: int
    prefix_cache_bytes: int
    prefill_chunk: int  # prompt tokens a step
    # Tokens of the KV cache that a patch takes: in the tower; until it is read.
    patch_tokens: tuple[float, float] = (0.0, 0.0)
    compile: Mode = "off"  # see ``CompiledDecode``


class Engine:
    """Continuous batching over the slots of one KV cache.

    ``submit`` and ``close`` may be called on any thread; everything else is the engine's own.
    """

    def __init__(self, loaded: LoadedModel, options: EngineOptions):
        self._options = options
        self._runner = Runner(loaded.model, mode=options.compile, native=loaded.native)
        self._budget = self._runner.layout.tokens_in(options.kv_cache_bytes, options.slots)
        if self._budget < _LEAST_TOKENS:
            raise ModelLoadError(
                f"the KV cache has room for {self._budget} tokens only: free memory, or set "
                "QWENVL_KV_CACHE_MB"
            )
        self._scheduler = Scheduler(
            options.slots,
            self._budget,
            options.prefill_chunk,
            options.prefill_chunk * self._runner.merge**2,
            self._runner.depth,
            options.patch_tokens,
        )
        whole = bool(self._runner.layout.states)
        self.prefixes = PrefixCache(options.prefix_cache_bytes, whole=whole)
        limit = self._scheduler.cache_limit
        self._executor = Executor(self._runner, self.prefixes, self._budget, limit)
        most = options.max_new_tokens
        self._intake = Intake(loaded, self._runner, self._scheduler, self.prefixes, most)
        self._inbox = Inbox()
        self._failures = 0
        self.failure: Status | None = None  # once nothing works any more
        self.steps = 0
        self.step_began: float | None = None  # time.monotonic(), while a step is running
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Sequences that hold a slot; those that are free are ``slots`` less this."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._scheduler.waiting) + len(self._inbox)

    @property
    def cache_bytes(self) -> int:
        """Memory that the KV cache holds."""
        return self._executor.cache.bytes

    def stats(self) -> BackendStats:
        """See ``backends.Backend``. What other threads change meanwhile may be a step old."""
        layout, compiled = self._runner.layout, self._runner.compiled
        return BackendStats(
            slots=self._options.slots,
            running=self.running,
            waiting=self.waiting,
            steps=self.steps,
            kv_tokens=sum(sequence.computed for sequence in list(self._scheduler.running)),
            kv_budget_tokens=self._budget,
            kv_bytes=self.cache_bytes,
            kv_budget_bytes=layout.bytes(self._budget, self._options.slots),
            prefix_queries=self.prefixes.hits + self.prefixes.misses,
            prefix_hits=self.prefixes.hits,
            prefix_bytes=self.prefixes.bytes,
            prefix_budget_bytes=self.prefixes.budget,
            gpu_memory=gpu_memory(layout.devices),
            cuda_graphs=len(compiled.graphs) if compiled else 0,
            cuda_graph_failures=compiled.failures if compiled else 0,
        )

    def submit(self, request: GenerationRequest) -> Sequence:
        """Prepare ``request`` on the calling thread and queue it.

        Raises TooLarge for one that could never fit, before any work, Unavailable when closed, and
        InternalError when the engine has failed for good.
        """
        arrived = time.monotonic()
        sequence = self._intake(request, arrived)
        self._inbox.put(sequence)
        return sequence

    def close(self) -> None:
        """End whatever runs or waits with Unavailable, and the thread. Any number of times.

        A step that does not end is waited for, but not for ever.
        """
        self._inbox.close(Unavailable.stopping())
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            log.error("the engine's thread is stuck in a step and is left behind")

    # From here on: the engine's thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._executor.rehearse(self._options.slots)
                while self._wait():
                    self.step()
        except BaseException as error:
            log.exception("the engine's thread ends")
            self._give_up(f"the engine's thread ended ({type(error).__name__})")
        finally:
            refusal = InternalError(FAILED) if self.failure else Unavailable.stopping()
            self._inbox.close(refusal)
            self._scheduler.waiting.extend(self._inbox.collect(wait=False))
            for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
                self._scheduler.remove(sequence)
                sequence.finish(refusal)

    def _wait(self) -> bool:
        """Wait for something to do; False when there will be nothing any more."""
        idle = not (self._scheduler.running or self._scheduler.waiting or self.failure)
        self._scheduler.waiting.extend(self._inbox.collect(wait=idle))
        return not (self._inbox.closed or self.failure)

    def step(self) -> None:
        """One step: schedule, prefill, decode also those whose prompt has just ended."""
        self.steps += 1
        self.step_began = time.monotonic()
        try:
            running, executor = self._scheduler.running, self._executor
            self._post_process(executor.prefill(self._schedule(), running))
            self._post_process(executor.decode(self._scheduler.complete(), running))
            executor.shrink(running)
        except Exception as error:
            self._fail(error)
        finally:
            self.step_began = None

    def _schedule(self) -> Step:
        now = time.monotonic()
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if sequence.cancelled:
                self._end(sequence, FinishReason.CANCELLED)
            elif sequence.deadline is not None and now >= sequence.deadline:
                self._end(sequence, DeadlineExceeded())
        for sequence in self._scheduler.fill_slots():
            sequence.started = now
            self._intake.look_again(sequence)
        self._executor.restore_prefixes(self._scheduler.running)
        return self._scheduler.next_step()

    def _post_process(self, outcomes: list[Outcome]) -> None:
        for sequence, token, score in outcomes:
            end: FinishReason | ServiceError | None
            try:
                if isinstance(token, ServiceError):
                    end = token
                else:
                    sequence.append(token, score)
                    end = sequence.reason_to_end(self._intake.ends)
            except Exception:
                log.exception("post-processing failed (request %s)", sequence.request_id)
                end = InternalError(FAILED)
            if end is not None:
                self._end(sequence, end)

    def _end(self, sequence: Sequence, how: FinishReason | ServiceError) -> None:
        if sequence.continues and isinstance(how, FinishReason):  # before the next turn can come
            self._executor.keep(sequence, self._scheduler.running)
        moved = self._scheduler.remove(sequence)
        sequence.finish(how)
        if isinstance(how, FinishReason) and how is not FinishReason.CANCELLED:
            self._failures = 0
        self._executor.remove(sequence, moved)

    def _fail(self, error: Exception) -> None:
        """End what runs, and go on with an empty cache, unless that is no use any more."""
        ids = ", ".join(sequence.request_id for sequence in self._scheduler.running)
        log.exception("a step failed, and the requests in it end: %s", ids)
        exhausted = is_out_of_memory(error)
        # A CUDA error stays with the process: everything after it fails too. Not so want of memory.
        fatal = isinstance(error, torch.AcceleratorError) and not exhausted
        for sequence in list(self._scheduler.running):
            self._scheduler.remove(sequence)
            sequence.finish(Unavailable.exhausted() if exhausted else InternalError(FAILED))
        self._failures += not exhausted
        if fatal or self._failures >= _MAX_FAILURES:
            self._give_up(f"the model fails ({type(error).__name__})")
            return
        self._executor.reset()
        if exhausted:
            self.prefixes.clear()

    def _give_up(self, message: str) -> None:
        self.failure = Status(Phase.FAILED, f"{message}; the service has to be restarted")
        log.critical(self.failure.message)
