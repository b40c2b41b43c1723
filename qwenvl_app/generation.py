"""The vocabulary that web, backends and engine share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

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

    @classmethod
    def draining(cls) -> Status:
        """From now on."""
        return cls(Phase.DRAINING, "the service is stopping")

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


# Around a call in an answer's text: Hermes' marks, which Qwen's templates ask for.
CALL_MARKS = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for. ``arguments`` is a JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: texts and pictures (RGB) in their order.

    ``reasoning`` and ``tool_calls`` are an assistant's; the text of a ``tool`` message is a result.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[str | Image, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def question(image: Image, prompt: str) -> tuple[Message, ...]:
    """The conversation of one picture and one prompt about it."""
    return (Message("user", (image, prompt)),)


@dataclass(frozen=True)
class Constraint:
    """What the answer's text, after any reasoning, has to be.

    ``json``: a JSON value that ``schema`` admits ({} admits all, {"type": "object"} any object).
    ``tools``: one or more calls of ``tools`` in Hermes' form, and nothing else; one if ``single``.
    """

    kind: Literal["json", "tools"]
    schema: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    single: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation, whose next message is wanted.

    ``stream``: whether deltas are wanted as they come; else the text may come in one piece.
    ``deadline``: a point of ``time.monotonic()`` after which nobody wants the answer.
    ``tools``: functions as the chat template takes them; ``template_options`` go to it too.
    ``logprobs``: alternatives wanted for each token (0: the token's own alone; None: nothing).
    ``continues``: whether another turn may follow, so that this one's answer is worth keeping.
    ``pixels``: the least and the most that a picture is scaled to; None leaves the checkpoint's.
    ``originals``: the file of each picture, for a backend that sends them on; else nothing.
    ``owner``: what was computed for one owner's requests is of use to no other's.
    """

    messages: tuple[Message, ...]
    request_id: str
    sampling: SamplingParams = SamplingParams()
    stream: bool = False
    deadline: float | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    logprobs: int | None = None
    pixels: tuple[int | None, int | None] = (None, None)
    continues: bool = True
    originals: tuple[bytes, ...] = ()
    owner: str = ""

    @property
    def images(self) -> list[Image]:
        """All pictures, in their order."""
        parts = [part for message in self.messages for part in message.content]
        return [part for part in parts if not isinstance(part, str)]


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
    cuda_graphs: int = 0
    cuda_graph_failures: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer: its text, its bytes, and the natural logarithm of its probability.

    ``top``: the likeliest tokens at its place, the likeliest first, each without a ``top``.
    """

    text: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. The last one, and only it, has a finish reason, usage and timings.

    ``reasoning`` is text that the model wrote before its answer.
    """

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
