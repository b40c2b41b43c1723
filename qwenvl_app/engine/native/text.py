"""Qwen's dense language model in C++: prefill and decode are one call each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Many
from typing import Any

import torch

from qwenvl_app.engine.eager import Chunk
from qwenvl_app.engine.kv_cache import SlotCache
from qwenvl_app.engine.native.library import freed_with
from qwenvl_app.engine.native.structs import TextCall, TextModel
from qwenvl_app.engine.native.team import Team


class NativeText:
    """Layers and head of a language model. Used by the engine's thread alone."""

    def __init__(self, library: ctypes.CDLL, team: Team, model: TextModel):
        self._model, self._team, self._forward = model, team, library.forward
        self._forward.argtypes = (ctypes.c_void_p, ctypes.POINTER(TextCall))
        library.delete_text.argtypes = (ctypes.c_void_p,)
        self._text = library.new_text(team.address, ctypes.byref(model))
        self._cache: SlotCache | None = None
        self._version = -1  # of that cache, whose addresses are the following
        self._keys = self._values = (ctypes.c_void_p * 0)()
        freed_with(self, library.delete_text, self._text)

    def __call__(
        self,
        cache: SlotCache,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        chunks: Many[Chunk],
        images: torch.Tensor | None = None,
        deepstack: Many[torch.Tensor] = (),
    ) -> torch.Tensor:
        """As ``EagerText``; ``embeds`` is written over."""
        if cache is not self._cache or cache.version != self._version:
            self._cache, self._version = cache, cache.version
            self._keys, self._values = map(_addresses, cache.first(cache.slots, cache.length))
        logits = torch.empty(len(chunks), self._model.vocabulary)
        features = _addresses(deepstack)
        call = TextCall(
            threads=self._team.threads(len(embeds)),
            tokens=len(embeds),
            chunks=len(chunks),
            images=len(deepstack),
            length=cache.length,
            x=embeds,
            positions=positions,
            chunk=torch.tensor(chunks),
            keys=ctypes.addressof(self._keys),
            values=ctypes.addressof(self._values),
            image=images,
            deepstack=ctypes.addressof(features),
            logits=logits,
        )
        self._forward(self._text, call)
        return logits


def _addresses(tensors: Many[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
