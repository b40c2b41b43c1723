"""The language model by transformers' own code, which runs unchanged."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qwenvl_app.engine.kv_cache import SlotCache

Chunk = tuple[int, int, int]  # of a slot: its number, the first token's place, how many tokens


class EagerText:
    """Layers and head of a language model. Used by the engine's thread alone."""

    def __init__(self, model: Any):
        self._head, self._text = model.lm_head, model.model.language_model

    def __call__(
        self,
        cache: SlotCache,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        chunks: Many[Chunk],
        images: torch.Tensor | None = None,
        deepstack: Many[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Compute the tokens of ``chunks``, one after the other, and write them to ``cache``.

        ``embeds`` (tokens, hidden); ``positions`` (tokens, 3). ``deepstack``: for each of the first
        layers, (image tokens, hidden); ``images`` (tokens) tells which of those is a token's, in
        order, or -1. Logits (chunks, vocabulary): after the last token of each.
        """
        slots, starts, widths = zip(*chunks, strict=True)
        visual: dict[str, Any] = {}
        if deepstack and images is not None:
            where = _rows(images >= 0, widths).to(embeds.device)
            visual = {"visual_pos_masks": where, "deepstack_visual_embeds": deepstack}
        hidden = self._text(
            inputs_embeds=_rows(embeds, widths),
            attention_mask=added(cache.begin(slots, starts, widths), cache.layout.dtype),
            position_ids=_rows(positions, widths).permute(2, 0, 1).to(embeds.device),
            past_key_values=cache,
            use_cache=True,
            **visual,
        ).last_hidden_state
        ends = torch.tensor(widths, device=hidden.device) - 1
        logits: torch.Tensor = self._head(
            hidden[torch.arange(len(chunks), device=ends.device), ends]
        )
        return logits


def _rows(tokens: torch.Tensor, widths: Many[int]) -> torch.Tensor:
    """Tokens of several rows one after the other, (tokens, ...), as (rows, widest, ...)."""
    return pad_sequence(list(torch.split_with_sizes(tokens, list(widths))), batch_first=True)


def added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To be added: from True and False each layer's attention would make this for itself."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
