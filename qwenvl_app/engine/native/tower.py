"""Qwen3-VL's vision tower in C++."""

from __future__ import annotations

import ctypes

import torch

from qwenvl_app.engine.native.library import freed_with
from qwenvl_app.engine.native.structs import EmbedCall, MergerCall, TowerCall, TowerModel
from qwenvl_app.engine.native.team import Team


class NativeTower:
    """A tower: its embedding, layers and mergers. Used by the engine's thread alone."""

    def __init__(self, library: ctypes.CDLL, team: Team, model: TowerModel):
        self._model, self._team = model, team
        self._embed, self._layer, self._merge = library.embed, library.layer, library.merge
        self._embed.argtypes = (ctypes.c_void_p, ctypes.POINTER(EmbedCall))
        self._layer.argtypes = (ctypes.c_void_p, ctypes.POINTER(TowerCall))
        self._merge.argtypes = (ctypes.c_void_p, ctypes.POINTER(MergerCall))
        library.delete_tower.argtypes = (ctypes.c_void_p,)
        self._tower = library.new_tower(team.address, ctypes.byref(model))
        freed_with(self, library.delete_tower, self._tower)

    def embed(self, pixels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What the first layer takes (patches, width) of ``pixels`` (patches, inputs).

        ``places`` (patches, width): learned positions.
        """
        hidden = torch.empty_like(places)
        call = EmbedCall(
            threads=self._team.threads(len(pixels)),
            patches=len(pixels),
            pixels=pixels,
            places=places,
            y=hidden,
        )
        self._embed(self._tower, call)
        return hidden

    def __call__(
        self,
        number: int,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """One layer on ``hidden`` (patches, width), which is written over and returned.

        ``rotary``: cosines and sines, (patches, head_dim). ``lengths``: where each picture begins,
        (pictures + 1), int32.
        """
        call = TowerCall(
            threads=self._team.threads(len(hidden)),
            number=number,
            patches=len(hidden),
            pictures=len(lengths) - 1,
            x=hidden,
            cosines=rotary[0],
            sines=rotary[1],
            starts=lengths,
        )
        self._layer(self._tower, call)
        return hidden

    def merge(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` (patches, width) by a merger: (tokens, width of the language model).

        ``number``: 0 is the one after the last layer, then DeepStack's in order.
        """
        model = self._model
        tokens = hidden.new_empty(hidden.numel() // model.merged, model.out)
        call = MergerCall(
            threads=self._team.threads(len(hidden)),
            number=number,
            patches=len(hidden),
            x=hidden,
            y=tokens,
        )
        self._merge(self._tower, call)
        return tokens
