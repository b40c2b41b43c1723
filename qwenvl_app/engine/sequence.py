"""One request in the engine: everything that is per request lives here."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Set
from dataclasses import replace
from typing import NamedTuple

from qwenvl_app.engine.inputs import Inputs, Span
from qwenvl_app.engine.logprobs import Score
from qwenvl_app.engine.prefix_cache import Prefix
from qwenvl_app.engine.rendering import Renderer
from qwenvl_app.engine.sampling import Sampler, repeats_itself
from qwenvl_app.errors import DeadlineExceeded, ServiceError
from qwenvl_app.generation import Delta, FinishReason, GenerationRequest, Timings, Usage

_CHECK_REPETITION = 16  # tokens between two looks


class Tokens(NamedTuple):
    """New ones of the answer; ``scores`` has one for each, if they are wanted."""

    ids: list[int]
    scores: list[Score]


Event = Tokens | FinishReason | ServiceError


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
        renderer: Renderer,
        arrived: float,
        prefix: Prefix | None = None,
    ):
        self.request_id, self.params = request.request_id, request.sampling
        self.deadline, self.continues = request.deadline, request.continues
        # Who gets the text in one piece at the end is not woken up for every token.
        self.eager = request.stream or bool(request.sampling.stop)
        self.inputs, self.sampler, self.limit = inputs, sampler, limit
        self.logprobs = request.logprobs
        self.prefix = prefix
        self.computed = 0  # tokens of prompt and answer whose keys and values are in the cache
        self.cached = 0  # of them, those that came from the prefix cache
        self.tokens: list[int] = []  # the answer's
        self.queued = time.monotonic()
        self.timings = Timings(preprocess=self.queued - arrived)
        self.started = self.first_token = 0.0
        self._last_position = int(inputs.positions[0, -1])  # of the prompt
        self._arrived, self._sent = arrived, 0
        self._scores: list[Score] = []  # of the tokens that are not sent yet
        self._renderer = renderer
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    @property
    def images(self) -> list[Span]:
        """Pictures that are computed for it: those that no prefix was found of."""
        found = self.prefix.length if self.prefix else self.cached
        return [image for image in self.inputs.images if image.tokens.stop > found]

    @property
    def unseen(self) -> list[Span]:
        """Of them, those that the vision tower has not been through with."""
        return [i for i in self.images if i.features is None and i.tokens.stop > self.computed]

    @property
    def seen(self) -> bool:
        """Whether the vision tower has nothing to do for it, any more or at all."""
        return not self.unseen

    @property
    def patches(self) -> int:
        """Of its pictures, but for those whose part of the cache was found."""
        return sum(image.patches for image in self.images)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, those of pictures included."""
        return len(self.inputs.ids)

    @property
    def reserved(self) -> int:
        """The most tokens that it will have in the KV cache."""
        return self.prompt_length + self.limit

    @property
    def prefix_key(self) -> bytes | None:
        """See ``Inputs``."""
        return self.inputs.prefix_key

    @property
    def boundary(self) -> int:
        """See ``Inputs``."""
        return self.inputs.boundary

    @property
    def position(self) -> int:
        """Of the latest token of the answer; the same in all three dimensions."""
        return self._last_position + len(self.tokens)

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

    def append(self, token: int, score: Score | None = None) -> None:
        """One more token of the answer."""
        if not self.tokens:
            self.first_token = time.monotonic()
        self.tokens.append(token)
        if score:
            self._scores.append(score)
        if self.eager:
            self._send()

    def reason_to_end(self, ends: Set[int]) -> FinishReason | None:
        """Why its latest token is the last one, if it is. ``ends``: those that say so."""
        params = self.params
        if self.tokens[-1] in ends and not params.ignore_eos:
            return FinishReason.STOP
        if len(self.tokens) >= self.limit:
            return FinishReason.LENGTH
        due = params.repetition_limit and len(self.tokens) % _CHECK_REPETITION == 0
        if due and repeats_itself(self.tokens, params.repetition_limit):
            return FinishReason.REPETITION
        return None

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
        self.prefix = None
        for image in self.inputs.images:
            image.pixels = image.features = None
        self._send()
        self._events.put(end)

    def __iter__(self) -> Iterator[Delta]:
        """See ``backends.Generation``. Text is made here, not on the engine's thread."""
        renderer, count = self._renderer, 0
        while isinstance(event := self._next(), Tokens):
            count += len(event.ids)
            delta = renderer.push(*event)
            if renderer.stopped:
                self._cancelled.set()
                while isinstance(self._next(), Tokens):
                    pass  # what came after the stop string
                yield self._last(delta, FinishReason.STOP, count)
                return
            if delta.text or delta.reasoning:
                yield delta
        if isinstance(event, ServiceError):
            raise event
        delta = renderer.flush()
        yield self._last(delta, FinishReason.STOP if renderer.stopped else event, count)

    def _next(self) -> Event:
        """What the engine says next, or that it is too late: a stuck engine holds nobody."""
        if self.deadline is None:
            return self._events.get()
        try:
            return self._events.get(timeout=max(0.0, self.deadline - time.monotonic()))
        except queue.Empty:
            self.cancel()
            return DeadlineExceeded()

    def _last(self, delta: Delta, reason: FinishReason, count: int) -> Delta:
        usage = Usage(self.prompt_length, count, self.cached, self._renderer.reasoned)
        return replace(delta, finish_reason=reason, usage=usage, timings=self.timings)

    def _send(self) -> None:
        if self._sent < len(self.tokens):
            self._events.put(Tokens(self.tokens[self._sent :], self._scores))
            self._sent, self._scores = len(self.tokens), []
