"""The vision tower, in as many steps as it takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from qwenvl_app.engine.sequence import Features, Sequence


class Encoding:
    """Pictures on their way through the vision tower, which may take several steps.

    ``Qwen3VLVisionModel.forward`` cut between its layers, so that one large picture does not hold
    up the answers that are being written.
    """

    def __init__(self, visual: Any, sequences: list[Sequence]):
        self._visual, self._merge = visual, visual.spatial_merge_size
        device = visual.patch_embed.proj.weight.device
        pixels = torch.cat([s.inputs.pixels for s in sequences if s.inputs.pixels is not None])
        grid = torch.tensor([s.inputs.grid for s in sequences], device=device)
        self._sizes = [s.patches // self._merge**2 for s in sequences]
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=self._merge,
        )
        self._lengths, self._longest = get_vision_attention_seqlens(grid, visual.config)
        hidden = visual.patch_embed(pixels.to(device=device, dtype=visual.dtype))
        places = (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
        self._hidden = hidden + places.to(hidden.dtype)
        ids = get_vision_position_ids(grid, self._merge)
        self._rotary = visual.rotary_pos_emb(self._hidden, ids)
        self._deepstack: list[torch.Tensor] = []

    def advance(self, first: int, last: int) -> list[Features] | None:
        """Run layers ``first`` to ``last`` (exclusive); the features, once all have run."""
        visual = self._visual
        for number in range(first, last):
            self._hidden = visual.blocks[number](
                self._hidden,
                cu_seqlens=self._lengths,
                max_seqlen=self._longest,
                position_embeddings=self._rotary,
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
