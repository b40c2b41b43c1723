"""Whether what was compiled computes what the model does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qwenvl_app.engine.compiled import alike
from qwenvl_app.engine.eager import Chunk, EagerText
from qwenvl_app.engine.kv_cache import BLOCK, SlotCache
from qwenvl_app.engine.layout import layout_of
from qwenvl_app.engine.native.layout import mergers
from qwenvl_app.engine.native.text import NativeText
from qwenvl_app.engine.native.tower import NativeTower

_ROWS = 7  # more are, as seven, tiles of up to six one after another
_PICTURES = (0, 5, 103)  # where each begins, in patches; 96 are multiplied at once


def text_agrees(native: NativeText, model: Any) -> bool:
    """Whether its logits are those of ``model`` on noise: steps of some rows, and prompts."""
    rows = [(row, (BLOCK // 2 + 37 * row) % BLOCK, 1) for row in range(_ROWS)]
    steps = [rows[:count] for count in range(1, _ROWS + 1)]
    prompts: list[Chunk] = [(0, 3, 70), (2, 11, 1), (1, 0, 9)]
    return all(_logits_agree(native, model, chunks) for chunks in (*steps, prompts))


def _logits_agree(native: NativeText, model: Any, chunks: list[Chunk]) -> bool:
    text = model.model.language_model
    tokens, hidden = sum(width for *_, width in chunks), text.config.hidden_size
    cache = SlotCache(layout_of(text))
    cache.fit(_ROWS, BLOCK)
    noise = torch.Generator().manual_seed(tokens)
    for tensor in (tensor for side in cache.first(_ROWS, BLOCK) for tensor in side):
        tensor.normal_(generator=noise)
    embeds = torch.randn(tokens, hidden, generator=noise)
    positions = torch.randint(BLOCK, (tokens, 3), generator=noise)
    images = (torch.arange(tokens) - 2).clamp(min=-1)  # the first two have none
    taps = getattr(model.model.visual, "deepstack_visual_indexes", ())
    deepstack = [torch.randn(max(0, tokens - 2), hidden, generator=noise) for _ in taps]
    return alike(
        native(cache, embeds.clone(), positions, chunks, images, deepstack),
        EagerText(model)(cache, embeds, positions, chunks, images, deepstack),
    )


def tower_agrees(native: NativeTower, visual: Any) -> bool:
    """Whether each of its parts is that of ``visual``, on noise of the size of what comes."""
    return all(alike(ours, theirs) for ours, theirs in _of_towers(native, visual))


def _of_towers(native: NativeTower, visual: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    config, size = visual.config, visual.blocks[0].attn.head_dim
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(_PICTURES[-1], config.hidden_size, generator=noise)
    still = torch.randn(len(hidden), 3, 1, config.patch_size**2, generator=noise)
    frames = still.expand(-1, -1, config.temporal_patch_size, -1).flatten(1)
    yield native.embed(still.flatten(1), hidden), visual.patch_embed(frames) + hidden
    angles = torch.randn(len(hidden), size // 2, generator=noise).repeat(1, 2)
    rotary, lengths = (angles.cos(), angles.sin()), torch.tensor(_PICTURES, dtype=torch.int32)
    for number, block in enumerate(visual.blocks):
        expected = block(hidden, cu_seqlens=lengths, max_seqlen=None, position_embeddings=rotary)
        yield native(number, hidden.clone(), rotary, lengths), expected
    whole = hidden[len(hidden) % config.spatial_merge_size**2 :]
    for number, merger in enumerate(mergers(visual)):
        yield native.merge(number, whole), merger(whole)
