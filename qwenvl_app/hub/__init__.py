"""Models by their names on ModelScope and Hugging Face: found in a cache, or downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from qwenvl_app.errors import ModelLoadError
from qwenvl_app.hub.base import Hub, Say

# Of ModelScope, or of Hugging Face after hf: with a revision perhaps.
_NAME = re.compile(r"(hf:)?([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(\w[\w.-]*))?")


class NotDownloaded(ModelLoadError):
    """What a name stands for is not here yet, or not all of it."""


def locate(name: str, *, download: bool, say: Say) -> Path | None:
    """The directory of the model ``name``; None if that can't be a name.

    Raises NotDownloaded if not all of it is here and none is to ``download``, else ModelLoadError
    if it can't be had. ``say`` is told how far a download is.
    """
    if not (match := _NAME.fullmatch(name)):
        return None
    hub, model = _hub(match[1]), match[2]
    revision = match[3] or hub.default_revision
    if directory := hub.cached(model, revision):
        return directory
    if not download:
        raise NotDownloaded(f"{name} is not in {hub.title}'s cache yet, or not all of it")
    return hub.download(model, revision, say)


def _hub(prefix: str | None) -> Hub:
    """Only now imported: it takes time, and nothing else here talks to a network."""
    if prefix:
        from qwenvl_app.hub.huggingface import HuggingFace

        return HuggingFace()
    from qwenvl_app.hub.modelscope import ModelScope

    return ModelScope()
