"""One request in the engine: everything that is per request lives here."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qwenvl_app.engine.detokenizer import Detokenizer, StopStrings
from qwenvl_app.engine.pixels import Grid
from qwenvl_app.engine.prefix_cache import Prefix
from qwenvl_app.engine.sampling import Sampler
from qwenvl_app.errors import DeadlineExceeded, ServiceError
from qwenvl_app.generation import Delta, FinishReason, GenerationRequest, Timings, Usage

Event = list[int] | FinishReason | ServiceError


@dataclass
class Features:
    """What the vision tower made of one picture, as the language model takes it.

    ``embeds`` (image tokens, hidden) and, for the first layers of the language model, DeepStack's
    additions of the same shape.
    """

    embeds: torch.Tensor
    deepstack: list[torch.Tensor]


@dataclass
class Inputs:
    """A request as the model takes it; tensors are on the CPU. Made on the request's thread."""

    ids: list[int]
    positions: torch.Tensor  # (3, tokens): temporal, vertical, horizontal
    grid: Grid
    image_tokens: range  # the places in ``ids`` that the picture's features go to
    pixels: torch.Tensor | None = None  # see ``pixels.Patcher``; not needed for a known picture
    image_key: bytes | None = None
    boundary: int = 0  # see ``scheduler.Job``


class Sequence:
    """State of one request, and the way of its tokens back to the thread that asked.

    Once submitted, the engine's thread alone changes it; but ``cancel`` may be called on any
    thread, and iterating is for the thread that asked.
    """

    def __init__(
        self,
        request: GenerationRequest,
        inputs: Inputs,
        sampler: Sampler,
        limit: int,
        detokenizer: Detokenizer,
        arrived: float,
        prefix: Prefix | None = None,
    ):
        self.request_id, self.params = request.request_id, request.sampling
        self.deadline = request.deadline
        # Who gets the text in one piece at the end is not woken up for every token.
        self.eager = request.stream or bool(request.sampling.stop)
        self.inputs, self.sampler, self.limit = inputs, sampler, limit
        self.prefix = prefix
        self.features: Features | None = None
        self.computed = 0  # tokens of prompt and answer whose keys and values are in the cache
        self.cached = 0  # of them, those that came from the prefix cache
        self.tokens: list[int] = []  # the answer's
        self.queued = time.monotonic()
        self.timings = Timings(preprocess=self.queued - arrived)
        self.started = self.first_token = 0.0
        self._arrived, self._sent = arrived, 0
        self._detokenizer = detokenizer
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    @property
    def patches(self) -> int:
        """Patches of the picture in the vision tower."""
        time_, rows, columns = self.inputs.grid
        return time_ * rows * columns

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, the picture's included."""
        return len(self.inputs.ids)

    @property
    def reserved(self) -> int:
        """The most tokens it will have in the cache."""
        return self.prompt_length + self.limit

    @property
    def image_key(self) -> bytes | None:
        """Equal for equal pictures; None if nothing is shared."""
        return self.inputs.image_key

    @property
    def boundary(self) -> int:
        """See ``scheduler.Job``."""
        return self.inputs.boundary

    @property
    def encoded(self) -> bool:
        """Whether the vision tower has nothing to do for it, any more or at all."""
        return (
            self.features is not None
            or self.prefix is not None
            or self.computed >= self.inputs.image_tokens.stop
        )

    @property
    def position(self) -> int:
        """Of the latest token of the answer; the same in all three dimensions."""
        return int(self.inputs.positions[0, -1]) + len(self.tokens)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants this answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """See ``backends.Generation``. Who iterates is told at once, the slot is free soon."""
        self._cancelled.set()
        self._events.put(FinishReason.CANCELLED)

    def start(self) -> None:
        """It has a slot now."""
        self.started = time.monotonic()

    def append(self, token: int) -> None:
        """One more token of the answer."""
        if not self.tokens:
            self.first_token = time.monotonic()
        self.tokens.append(token)
        if self.eager:
            self._send()

    def finish(self, end: FinishReason | ServiceError) -> None:
        """The end, exactly once."""
        now = time.monotonic()
        started, first = self.started or now, self.first_token or now
        self.timings = Timings(
            preprocess=self.timings.preprocess,
            queue=started - self.queued,
            prefill=first - started,
            first_token=first - self._arrived,
            decode=now - first,
        )
        self.features = self.prefix = None
        self._send()
        self._events.put(end)

    def __iter__(self) -> Iterator[Delta]:
        """See ``backends.Generation``. Text is made here, not on the engine's thread."""
        detokenizer, stops, count = self._detokenizer, StopStrings(self.params.stop), 0
        while True:
            event = self._next()
            if isinstance(event, ServiceError):
                raise event
            if isinstance(event, FinishReason):
                text, stopped = stops.push(detokenizer.flush())
                text += stops.flush()
                yield self._last(text, FinishReason.STOP if stopped else event, count)
                return
            count += len(event)
            text, stopped = stops.push(detokenizer.push(event))
            if stopped:
                self._cancelled.set()
                while isinstance(event := self._next(), list):
                    pass  # what came after the stop string
                yield self._last(text, FinishReason.STOP, count)
                return
            if text:
                yield Delta(text)

    def _next(self) -> Event:
        """What the engine says next, or that it is too late: a stuck engine holds nobody."""
        if self.deadline is None:
            return self._events.get()
        try:
            return self._events.get(timeout=max(0.0, self.deadline - time.monotonic()))
        except queue.Empty:
            self.cancel()
            return DeadlineExceeded()

    def _last(self, text: str, reason: FinishReason, count: int) -> Delta:
        usage = Usage(self.prompt_length, count, self.cached, self._detokenizer.reasoned)
        return Delta(text, reason, usage, self.timings)

    def _send(self) -> None:
        if self._sent < len(self.tokens):
            self._events.put(self.tokens[self._sent :])
            self._sent = len(self.tokens)
