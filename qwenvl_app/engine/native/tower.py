"""The layers of Qwen3-VL's vision tower in C++."""

from __future__ import annotations

import ctypes

import torch

from qwenvl_app.engine.native.library import freed_with
from qwenvl_app.engine.native.structs import TowerCall, TowerModel
from qwenvl_app.engine.native.team import Team


class NativeTower:
    """All layers of a tower. Used by the engine's thread alone."""

    def __init__(self, library: ctypes.CDLL, team: Team, model: TowerModel):
        self._model, self._team, self._layer = model, team, library.layer
        self._layer.argtypes = (ctypes.c_void_p, ctypes.POINTER(TowerCall))
        library.delete_tower.argtypes = (ctypes.c_void_p,)
        self._tower = library.new_tower(team.address, ctypes.byref(model))
        freed_with(self, library.delete_tower, self._tower)

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
