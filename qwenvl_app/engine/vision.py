"""The vision tower, in as many steps as it takes.

Families differ most here, and each part is used where the tower has it. Qwen3-VL has learned
positions and DeepStack, Qwen3.5 learned positions alone. Of Qwen2.5-VL's layers most look at one
window of a picture at a time: its patches lie in the order of the windows meanwhile, those that are
merged still side by side.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from qwenvl_app.engine.geometry import Geometry, by_windows, measure, patch_kernel
from qwenvl_app.engine.inputs import Features, Span
from qwenvl_app.engine.native.tower import NativeTower
from qwenvl_app.engine.pixels import Grid

_SMALL = 1024  # patches in all: what is kept for later is at most a few MB each


class VisionTower:
    """transformers' ``visual``, part by part. Used by the engine's thread alone."""

    def __init__(self, visual: Any, native: NativeTower | None = None):
        self._native = native
        self.visual, self.merge = visual, visual.spatial_merge_size
        self._kernel = patch_kernel(visual)
        # Many pictures have one of few shapes, and for small ones this is a sixth of the work. Of
        # ``visual`` and not of this object, which would keep itself.
        self._measure = partial(measure, visual)
        self._known = lru_cache(maxsize=16)(self._measure)

    def geometry(self, grids: tuple[Grid, ...]) -> Geometry:
        """For pictures of these grids, one after the other."""
        small = sum(map(math.prod, grids)) <= _SMALL
        return self._known(grids) if small else self._measure(grids)

    def embed(self, pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Pixels as ``Patcher`` makes them to what the first layer takes (patches, hidden)."""
        pixels = pixels.flatten(1)
        if self._native and geometry.places is not None:
            return self._native.embed(pixels, geometry.places)
        pixels = pixels.to(self._kernel)
        hidden = F.linear(pixels, self._kernel, self.visual.patch_embed.proj.bias)
        if geometry.places is not None:
            hidden += geometry.places
        return by_windows(hidden, geometry.windows, self.merge) if geometry.windows else hidden

    def layer(self, number: int, hidden: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """One layer, from and to (patches, hidden)."""
        lengths = geometry.lengths
        if self._native:
            return self._native(number, hidden, geometry.rotary, lengths)
        if geometry.windows and number not in self.visual.fullatt_block_indexes:
            lengths = geometry.windows.lengths
        result: torch.Tensor = self.visual.blocks[number](
            hidden,
            cu_seqlens=lengths,
            max_seqlen=geometry.longest,
            position_embeddings=geometry.rotary,
        )
        return result

    def deepstack(self, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """What DeepStack takes after a layer (image tokens, width), if it does."""
        taps = getattr(self.visual, "deepstack_visual_indexes", ())
        if number not in taps:
            return None
        if self._native:
            return self._native.merge(1 + taps.index(number), hidden)
        taken: torch.Tensor = self.visual.deepstack_merger_list[taps.index(number)](hidden)
        return taken

    def merged(self, hidden: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """What the last layer gave as the language model takes it (image tokens, width)."""
        if self._native:
            return self._native.merge(0, hidden)
        merged: torch.Tensor = self.visual.merger(hidden)
        return merged[geometry.windows.order.argsort()] if geometry.windows else merged


class VisionPass:
    """Pictures on their way through the vision tower, which may take several steps.

    The tower's ``forward`` cut between its layers, so that one large picture does not hold up the
    answers that are being written.
    """

    def __init__(self, tower: VisionTower, images: list[Span]):
        self._tower = tower
        self._geometry = tower.geometry(tuple(image.grid for image in images))
        self._sizes = [image.patches // tower.merge**2 for image in images]
        pixels = torch.cat([image.pixels for image in images if image.pixels is not None])
        self._hidden = tower.embed(pixels, self._geometry)
        self._deepstack: list[torch.Tensor] = []

    def advance(self, first: int, last: int) -> list[Features] | None:
        """Run layers ``first`` to ``last`` (exclusive); the features, once all have run."""
        for number in range(first, last):
            self._hidden = self._tower.layer(number, self._hidden, self._geometry)
            if (taken := self._tower.deepstack(number, self._hidden)) is not None:
                self._deepstack.append(taken)
        if last < len(self._tower.visual.blocks):
            return None
        merged = self._tower.merged(self._hidden, self._geometry)
        embeds = torch.split_with_sizes(merged, self._sizes)
        layers = [torch.split_with_sizes(layer, self._sizes) for layer in self._deepstack]
        if len(embeds) == 1:
            return [Features(merged, self._deepstack)]
        # Copies: parts of one tensor would all stay until the last of them is read.
        return [
            Features(part.clone(), [layer[number].clone() for layer in layers])
            for number, part in enumerate(embeds)
        ]
