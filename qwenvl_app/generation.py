"""The vocabulary that web, backends and engine share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class Phase(StrEnum):
    """What a backend is doing."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(frozen=True)
class Status:
    """A phase, when it began (``time.monotonic()``), and a sentence for the operator."""

    phase: Phase
    message: str = ""
    since: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self.since


class FinishReason(StrEnum):
    """Why an answer ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. What is None is decided by the checkpoint's ``generation_config``.

    Names and meanings are those of transformers and of OpenAI's API. A temperature of 0 is greedy.
    ``seed`` makes a sampled answer repeatable at any load. ``stop`` are strings that end the answer
    and are not part of it. ``repetition_limit`` ends an answer whose last so many tokens are one
    passage over and over; 0 never does.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_limit: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One picture (RGB) and one prompt, to be answered.

    ``stream``: whether deltas are wanted as they come; else the text may come in one piece.
    ``deadline``: a point of ``time.monotonic()`` after which nobody wants the answer.
    """

    image: Image
    prompt: str
    request_id: str
    sampling: SamplingParams = SamplingParams()
    stream: bool = False
    deadline: float | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens read (the picture's included), how many of them were cached, and tokens written.

    ``reasoning_tokens`` are those of the written ones that are not part of the answer's text.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds: making the model's inputs, waiting for a slot, and from the slot on.

    ``prefill`` lasts from the slot to the first token, ``decode`` from there to the last one;
    ``first_token`` is the time from the request's arrival at the backend to its first token.
    """

    preprocess: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class BackendStats:
    """What a backend has under way; zero is what it does not know. Counters never go down.

    ``running`` sequences hold one of ``slots``, ``waiting`` ones want one. ``gpu_memory`` has bytes
    for each (index, kind), where the kind is allocated, reserved or total.
    """

    slots: int = 0
    running: int = 0
    waiting: int = 0
    steps: int = 0
    kv_tokens: int = 0
    kv_budget_tokens: int = 0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_bytes: int = 0
    prefix_budget_bytes: int = 0
    gpu_memory: Mapping[tuple[int, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. The last one, and only it, has a finish reason, usage and timings."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
