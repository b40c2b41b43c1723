"""The vision tower, in as many steps as it takes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from qwenvl_app.engine.pixels import Grid
from qwenvl_app.engine.sequence import Features, Sequence

_SMALL = 1024  # patches in all: what is kept for later is at most a few MB each


class Geometry(NamedTuple):
    """All that the tower needs to know of the shapes of some pictures, whatever is in them."""

    places: torch.Tensor  # (patches, hidden): the learned positions, interpolated
    rotary: tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (patches, head_dim)
    lengths: torch.Tensor  # (pictures + 1): where each begins
    longest: int | None


class Tower:
    """The vision tower. Used by the engine's thread alone."""

    def __init__(self, visual: Any):
        self.visual, self.merge = visual, visual.spatial_merge_size
        # patch_embed's convolution, whose kernel is its stride: a product, and several times faster
        # as one, on a CPU and on some GPUs (pytorch #174051). A picture's frames are all alike, so
        # the kernel's parts for them can be added up beforehand.
        kernel = visual.patch_embed.proj.weight
        self._kernel = kernel.detach().float().sum(2).flatten(1).to(kernel.dtype)
        # Many pictures have one of few shapes, and for small ones this is a sixth of the work.
        self._known = lru_cache(maxsize=16)(self._measure)

    def geometry(self, grids: tuple[Grid, ...]) -> Geometry:
        """For pictures of these grids, one behind the other."""
        small = sum(map(math.prod, grids)) <= _SMALL
        return self._known(grids) if small else self._measure(grids)

    def embed(self, pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Pixels as ``Patcher`` makes them to what the first layer takes (patches, hidden)."""
        pixels = pixels.to(device=self._kernel.device, dtype=self._kernel.dtype)
        hidden = F.linear(pixels.flatten(1), self._kernel, self.visual.patch_embed.proj.bias)
        hidden += geometry.places
        return hidden

    def _measure(self, grids: tuple[Grid, ...]) -> Geometry:
        visual, proj = self.visual, self.visual.patch_embed.proj
        grid = torch.tensor(grids, device=proj.weight.device)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=self.merge,
        )
        ids = get_vision_position_ids(grid, self.merge)
        rotary = visual.rotary_pos_emb(proj.weight, ids)  # of which it takes the device
        places = (visual.pos_embed(indices) * weights[:, :, None]).sum(1).to(proj.weight.dtype)
        return Geometry(places, rotary, *get_vision_attention_seqlens(grid, visual.config))


class Encoding:
    """Pictures on their way through the vision tower, which may take several steps.

    ``Qwen3VLVisionModel.forward`` cut between its layers, so that one large picture does not hold
    up the answers that are being written.
    """

    def __init__(self, tower: Tower, sequences: list[Sequence]):
        self._visual = tower.visual
        self._geometry = tower.geometry(tuple(s.inputs.grid for s in sequences))
        self._sizes = [s.patches // tower.merge**2 for s in sequences]
        pixels = torch.cat([s.inputs.pixels for s in sequences if s.inputs.pixels is not None])
        self._hidden = tower.embed(pixels, self._geometry)
        self._deepstack: list[torch.Tensor] = []

    def advance(self, first: int, last: int) -> list[Features] | None:
        """Run layers ``first`` to ``last`` (exclusive); the features, once all have run."""
        visual = self._visual
        for number in range(first, last):
            self._hidden = visual.blocks[number](
                self._hidden,
                cu_seqlens=self._geometry.lengths,
                max_seqlen=self._geometry.longest,
                position_embeddings=self._geometry.rotary,
            )
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                self._deepstack.append(merger(self._hidden))
        if last < len(visual.blocks):
            return None
        embeds = torch.split_with_sizes(visual.merger(self._hidden), self._sizes)
        layers = [torch.split_with_sizes(layer, self._sizes) for layer in self._deepstack]
        return [
            Features(part, [layer[number] for layer in layers])
            for number, part in enumerate(embeds)
        ]
