"""Calls of the language model: prefill and decode. The vision tower's are in ``vision.py``.

transformers' own code runs unchanged; what is done here is to call its parts with everything that
belongs to a request passed explicitly. Above all the positions: ``Qwen3VLModel`` would otherwise
keep ``rope_deltas``, the state of one request, on an object that all share (transformers #43952).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many
from typing import Any, Literal

import torch

from qwenvl_app.engine.compiled import CompiledDecode
from qwenvl_app.engine.eager import EagerText, added
from qwenvl_app.engine.fused import ATTENTION
from qwenvl_app.engine.inputs import Features, Span
from qwenvl_app.engine.kv_cache import SlotCache
from qwenvl_app.engine.layout import layout_of
from qwenvl_app.engine.memory import place
from qwenvl_app.engine.native import NONE, Native
from qwenvl_app.engine.recurrent import RecurrentCache
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.engine.vision import VisionPass, VisionTower
from qwenvl_app.errors import ModelLoadError

log = logging.getLogger(__name__)

Mode = Literal["off", "auto", "on"]  # the setting ``compile``
_USUAL = 2048  # tokens of a picture of a megapixel, a question and an answer


class Runner:
    """Calls of the model, in inference mode. Used by the engine's thread alone."""

    def __init__(self, model: Any, *, mode: Mode = "off", native: Native = NONE):
        self._model, self._text = model, model.model.language_model
        self._tower = VisionTower(model.model.visual, native.tower)
        if self._tower.visual.patch_embed.proj.weight.device.type == "meta":
            raise ModelLoadError(
                "the device has no room even for the vision tower: use a smaller or a quantised "
                "checkpoint"
            )
        self.layout = layout_of(self._text)
        self.max_length: int = self._text.config.max_position_embeddings
        self.depth = len(self._tower.visual.blocks)
        self.merge: int = self._tower.merge
        self._device = place(self._text.embed_tokens)
        self._native = native
        self._forward = native.text or EagerText(model)
        self.compiled = None if native.text else self._compile(mode)

    def _compile(self, mode: Mode) -> CompiledDecode | None:
        places = {self.device, self._device, *(p.device for p in self._model.parameters())}
        if mode == "auto" and self.device.type == "cuda" and len(places) == 1:
            able = not self.layout.states
            return CompiledDecode(self._step, self._decode, inductor=False) if able else None
        if mode != "on":
            return None
        if self.layout.states:
            raise ModelLoadError(
                "QWENVL_COMPILE=on does not know this model's recurrent layers: set "
                "QWENVL_COMPILE=off"
            )
        compiled = CompiledDecode(self._step, self._decode, inductor=True)
        if self._text.config._attn_implementation == "sdpa":
            self._text.set_attn_implementation(ATTENTION)
        if len(places) > 1:
            raise ModelLoadError(
                "QWENVL_COMPILE=on wants the whole model on one device: set QWENVL_COMPILE=off, or "
                "let QWENVL_DEVICE name one that has room for all of it"
            )
        return compiled

    @property
    def device(self) -> torch.device:
        """Where logits are."""
        return place(self._model.lm_head)

    def new_cache(self, budget: int) -> SlotCache:
        """An empty one, for up to ``budget`` tokens."""
        if self.layout.states:
            return RecurrentCache(self.layout)
        return SlotCache(self.layout, budget if self.compiled else 0)

    def rehearse(self, cache: SlotCache, slots: int) -> None:
        """Record the decode step of up to so many rows; ``cache`` is empty."""
        if self.compiled:
            self.compiled.rehearse(cache, slots, min(_USUAL, self.max_length))

    def begin_vision(self, images: list[Span]) -> VisionPass:
        """Begin the vision tower's work on ``images``, which have pixels."""
        return VisionPass(self._tower, images)

    def prefill(
        self, cache: SlotCache, sequences: list[Sequence], slots: Many[int], widths: Many[int]
    ) -> torch.Tensor:
        """Compute the next ``widths[i]`` prompt tokens of each, which has ``slots[i]``.

        Logits (sequences, vocabulary): those after each one's last token of this call.
        """
        each = list(zip(sequences, slots, widths, strict=True))
        if self.layout.states and len(each) > 1:  # what pads a row would be read
            return torch.cat([self.prefill(cache, [s], [slot], [width]) for s, slot, width in each])
        chunks = [(slot, s.computed, width) for s, slot, width in each]
        parts = [slice(start, start + width) for _, start, width in chunks]
        ids = [n for s, here in zip(sequences, parts, strict=True) for n in s.inputs.ids[here]]
        turned = [s.inputs.positions[:, p] for s, p in zip(sequences, parts, strict=True)]
        embeds = self._text.embed_tokens(torch.tensor(ids, device=self._device))
        images, deepstack = self._place_images(embeds, sequences, parts)
        positions = torch.cat(turned, 1).T.contiguous()
        return self._forward(cache, embeds, positions, chunks, images, deepstack)

    def _place_images(
        self, embeds: torch.Tensor, sequences: list[Sequence], parts: list[slice]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Put pictures' features into ``embeds`` (tokens, hidden).

        Returns of each token which image token of this call it is, or -1, and DeepStack's
        additions to those.
        """
        is_image = torch.zeros(len(embeds), dtype=torch.bool)
        features: list[Features] = []
        before = 0
        for sequence, here in zip(sequences, parts, strict=True):
            for image in sequence.images:
                tokens = image.tokens
                first, last = max(tokens.start, here.start), min(tokens.stop, here.stop)
                if first < last and image.features:
                    is_image[before + first - here.start : before + last - here.start] = True
                    shown = slice(first - tokens.start, last - tokens.start)
                    features.append(image.features.part(shown))
            before += here.stop - here.start
        if not features:
            return is_image.long() - 1, []
        places = is_image.to(embeds.device)
        embeds[places] = torch.cat([f.embeds for f in features]).to(embeds.device, embeds.dtype)
        layers = [torch.cat(each) for each in zip(*(f.deepstack for f in features), strict=True)]
        return torch.where(is_image, is_image.cumsum(0), 0) - 1, layers

    def decode(
        self, cache: SlotCache, ids: list[int], positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        """One token for each of the slots 0 to n; logits (n, vocabulary)."""
        if self._native.text:
            embeds = self._text.embed_tokens(torch.tensor(ids))
            chunks = [(slot, start, 1) for slot, start in enumerate(starts)]
            places = torch.tensor(positions)[:, None].expand(-1, 3).contiguous()
            return self._native.text(cache, embeds, places, chunks)
        if self.compiled and self.compiled.fits(cache, len(ids)):
            return self.compiled(cache, ids, positions, starts)
        return self._decode(cache, ids, positions, starts)

    def _decode(
        self, cache: SlotCache, ids: list[int], positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        mask = cache.begin(range(len(ids)), starts, [1] * len(ids))
        inputs = torch.tensor([ids, positions], device=self._device)
        return self._step(inputs[0], inputs[1], mask, cache)

    def _step(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        hidden = self._text(
            input_ids=ids[:, None],
            attention_mask=added(mask, self.layout.dtype),
            position_ids=positions[None, :, None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._logits(hidden[:, -1])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits
