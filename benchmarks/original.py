"""The replaced service's way of answering, behind the same HTTP: one ``generate`` at a time.

It ran the whole of a request inside an ``async def``: preparing the picture, generating, decoding,
while everybody else waited. Served by ``gunicorn -c config/gunicorn.conf.py
benchmarks.original:app``, so that what a comparison shows is the engine and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from qwenvl_app import create_app
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.generation import (
    BackendStats,
    Delta,
    FinishReason,
    GenerationRequest,
    Phase,
    Status,
)
from qwenvl_app.loading.load import load
from qwenvl_app.settings import Settings, load_settings
from tests.engines import inputs_of


def answer(loaded: LoadedModel, request: GenerationRequest, max_new_tokens: int) -> str:
    """Inputs, ``generate``, text."""
    inputs = inputs_of(loaded, request)
    with torch.inference_mode():
        output = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens)
    ids = output[:, inputs["input_ids"].shape[1] :]
    return str(loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)[0])


class Done:
    """A finished answer as a generation."""

    def __init__(self, text: str):
        self._text = text

    def __iter__(self) -> Iterator[Delta]:
        yield Delta(self._text, FinishReason.STOP)

    def cancel(self) -> None:
        """Too late."""


class OneAtATime:
    """See ``backends.Backend``."""

    def __init__(self, settings: Settings):
        self._loaded, self._limit = load(settings.model), settings.max_new_tokens
        self._lock = threading.Lock()
        self._status = Status(Phase.READY)

    def status(self) -> Status:
        """See ``backends.Backend``."""
        return self._status

    def stats(self) -> BackendStats:
        """See ``backends.Backend``."""
        return BackendStats()

    def generate(self, request: GenerationRequest) -> Done:
        """See ``backends.Backend``."""
        with self._lock:
            return Done(answer(self._loaded, request, self._limit))

    def close(self) -> None:
        """See ``backends.Backend``."""


settings = load_settings()
app = create_app(settings, OneAtATime(settings))
