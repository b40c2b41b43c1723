"""What a vision tower needs to know of the shapes of pictures, and how it takes their patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from qwenvl_app.engine.pixels import Grid


class Windows(NamedTuple):
    """The order of the image tokens by windows, and where each window begins, in patches."""

    order: torch.Tensor
    lengths: torch.Tensor


class Geometry(NamedTuple):
    """All that the tower needs to know of the shapes of some pictures, whatever is in them."""

    places: torch.Tensor | None  # (patches, hidden): the learned positions, interpolated
    rotary: tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (patches, head_dim)
    windows: Windows | None
    lengths: torch.Tensor  # (pictures + 1): where each begins
    longest: int | None


def measure(visual: Any, grids: tuple[Grid, ...]) -> Geometry:
    """For pictures of these grids, one after the other, in the tower ``visual``."""
    proj, merge = visual.patch_embed.proj, visual.spatial_merge_size
    here = torch.tensor(grids)
    grid = here.to(proj.weight.device)
    places = windows = None
    if hasattr(visual, "pos_embed"):
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        places = (visual.pos_embed(indices) * weights[:, :, None]).sum(1).to(proj.weight.dtype)
    ids = get_vision_position_ids(grid, merge)
    rotary = visual.rotary_pos_emb(proj.weight, ids)  # of which it takes the device
    if hasattr(visual, "fullatt_block_indexes"):
        order, lengths = get_vision_window_index(
            here,
            spatial_merge_size=merge,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        windows = Windows(order.to(grid.device), lengths)
        rotary = tuple(by_windows(part, windows, merge) for part in rotary)
    # Lengths stay on the CPU: each layer reads them three times, which waits for a GPU.
    return Geometry(places, rotary, windows, *get_vision_attention_seqlens(here, visual.config))


def by_windows(patches: torch.Tensor, windows: Windows, merge: int) -> torch.Tensor:
    """``patches`` (patches, ...) in the order of the windows."""
    merged = patches.view(-1, merge**2, patches.shape[-1])
    return merged[windows.order].flatten(0, 1)


def patch_kernel(visual: Any) -> torch.Tensor:
    """patch_embed's convolution as a product (hidden, inputs), since its kernel is its stride.

    Several times faster as one, on a CPU and on some GPUs (pytorch #174051). A picture's frames are
    all alike, so the kernel's parts for them are added up.
    """
    kernel = visual.patch_embed.proj.weight.detach()
    product: torch.Tensor = kernel.float().sum(2).flatten(1).to(kernel.dtype)
    return product
