"""What the routes answer, as models. ``openapi.py`` reads them; tests hold every answer to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class RecognizeAnswer(BaseModel):
    """The answer to a question about a picture."""

    status: Literal["success"]
    result: str


class FormUsage(BaseModel):
    """Tokens read and written; those cached are of the prompt, reasoning is of the answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int


class RecognizeDelta(BaseModel):
    """A piece of the answer."""

    delta: str


class RecognizeEnd(RecognizeAnswer):
    """The whole answer, why it ended, and what it took."""

    finish_reason: Literal["stop", "length", "repetition"] | None
    usage: FormUsage | None


class Error(BaseModel):
    """What went wrong, in Chinese."""

    detail: str


class FieldError(BaseModel):
    """One field that is missing or wrong, in FastAPI's form."""

    type: str
    loc: list[str | int]
    msg: str
    input: str | None
    ctx: dict[str, Any] = Field(default_factory=dict)


class FormError(BaseModel):
    """The fields of a form that are missing or wrong."""

    detail: list[FieldError]


class Alive(BaseModel):
    """The process lives."""

    status: Literal["alive"]


class Readiness(BaseModel):
    """What the service is doing, and for how many seconds."""

    phase: Literal["loading", "ready", "failed", "draining"]
    phase_seconds: float
    message: str
    version: str
