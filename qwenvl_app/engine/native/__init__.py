"""Qwen's models in float32 on a CPU in C++: ``native.cpp``, which g++ compiles at the first start.

PyTorch reads the weights for a few rows at a third of the memory's rate, and makes hundreds of
calls besides. Here a pass through the language model is one call, and so is a layer of the vision
tower, its embedding, and each merger; other threads have the interpreter's lock meanwhile. What is
made is checked against the model's own layers before it is used.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from qwenvl_app.engine.native import check, layout, library
from qwenvl_app.engine.native.team import Team
from qwenvl_app.engine.native.text import NativeText
from qwenvl_app.engine.native.tower import NativeTower

log = logging.getLogger(__name__)


class Native(NamedTuple):
    """The parts of a model that there is code for."""

    text: NativeText | None = None
    tower: NativeTower | None = None

    def take_over(self, model: Any) -> None:
        """Drop the products of ``model`` that are copied here; nobody calls its layers then."""
        parts = [model.model.language_model.layers, model.lm_head] if self.text else []
        parts += [model.model.visual] if self.tower else []
        for linear in (each for part in parts for each in part.modules()):
            if isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)


NONE = Native()


def create(model: Any, room: int, threads: tuple[int, int] = (1, 1)) -> Native:
    """That of ``model``, whose weights are not packed yet; if it has none of a part, the log says.

    ``room``: bytes that its own weights may take. ``threads``: see ``Team``.
    """
    text, visual = model.model.language_model, model.model.visual
    fits = layout.fits(text), layout.tower_fits(visual)
    weights = [*text.layers.parameters(), model.lm_head.weight] if fits[0] else []
    weights += (
        [p for p in visual.parameters() if p is not visual.pos_embed.weight] if fits[1] else []
    )
    size = sum(each.nbytes for each in weights)
    if size > room:
        log.info("the model's layers are PyTorch's: %d MiB more would make them faster", size >> 20)
        return NONE
    if not weights or not (made := library.build()):
        return NONE
    with torch.inference_mode():
        team = Team(made, *threads)
        packer = layout.Packer(made.block())
        native_text = native_tower = None
        if fits[0]:
            native_text = NativeText(made, team, layout.text_of(model, packer))
            if not check.text_agrees(native_text, model):
                log.error("the language model is PyTorch's: in C++ it has other logits")
                native_text = None
        if fits[1]:
            native_tower = NativeTower(made, team, layout.tower_of(visual, packer))
            if not check.tower_agrees(native_tower, visual):
                log.error("the vision tower is PyTorch's: in C++ it has other features")
                native_tower = None
    native = Native(native_text, native_tower)
    names = [name for name, part in native._asdict().items() if part]
    log.info("layers in C++: %s", " and ".join(names) or "none")
    return native
