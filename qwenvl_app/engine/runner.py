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
from qwenvl_app.engine.fused import ATTENTION
from qwenvl_app.engine.inputs import Features, Span
from qwenvl_app.engine.kv_cache import SlotCache
from qwenvl_app.engine.layout import layout_of
from qwenvl_app.engine.memory import place
from qwenvl_app.engine.native import ALL_KINDS, NativeDecode
from qwenvl_app.engine.recurrent import RecurrentCache
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.engine.vision import VisionPass, VisionTower
from qwenvl_app.errors import ModelLoadError

log = logging.getLogger(__name__)

Mode = Literal["off", "auto", "on"]  # the setting ``compile``
_USUAL = 2048  # tokens of a picture of a megapixel, a question and an answer


class Runner:
    """Calls of the model, in inference mode. Used by the engine's thread alone."""

    def __init__(self, model: Any, *, mode: Mode = "off", native: NativeDecode | None = None):
        self._model, self._text = model, model.model.language_model
        self._tower = VisionTower(model.model.visual)
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
        self.compiled = None if native else self._compile(mode)

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
        """Record or check the decode step of up to so many rows; ``cache`` is empty."""
        if native := self._native:
            kinds = range(1, min(slots, ALL_KINDS) + 1)
            if all(native.agrees(self._decode, cache, rows) for rows in kinds):
                log.info("decode steps are C++")
            else:
                log.error("decode steps are PyTorch's: those in C++ have other logits")
                self._native = None
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
        if self.layout.states and len(slots) > 1:  # what pads a row would be read
            each = zip(sequences, slots, widths, strict=True)
            return torch.cat([self.prefill(cache, [s], [slot], [width]) for s, slot, width in each])
        widest = max(widths)
        ids = torch.zeros(len(slots), widest, dtype=torch.long)
        positions = torch.zeros(3, len(slots), widest, dtype=torch.long)
        for number, (sequence, width) in enumerate(zip(sequences, widths, strict=True)):
            here = slice(sequence.computed, sequence.computed + width)
            ids[number, :width] = torch.tensor(sequence.inputs.ids[here])
            positions[:, number, :width] = sequence.inputs.positions[:, here]
        embeds = self._text.embed_tokens(ids.to(self._device))
        visual = self._place_images(embeds, sequences, widths)
        mask = cache.begin(slots, [s.computed for s in sequences], widths)
        hidden = self._text(
            inputs_embeds=embeds,
            attention_mask=self._mask(mask),
            position_ids=positions.to(self._device),
            past_key_values=cache,
            use_cache=True,
            **visual,
        ).last_hidden_state
        ends = torch.tensor(widths, device=hidden.device) - 1
        return self._logits(hidden[torch.arange(len(slots), device=hidden.device), ends])

    def _place_images(
        self, embeds: torch.Tensor, sequences: list[Sequence], widths: Many[int]
    ) -> dict[str, Any]:
        """Put pictures' features into ``embeds`` (rows, widest, hidden); DeepStack's arguments."""
        is_image = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        parts: list[Features] = []
        for number, (sequence, width) in enumerate(zip(sequences, widths, strict=True)):
            start = sequence.computed
            for image in sequence.images:
                tokens = image.tokens
                first, last = max(tokens.start, start), min(tokens.stop, start + width)
                if first < last and image.features:
                    is_image[number, first - start : last - start] = True
                    parts.append(
                        image.features.part(slice(first - tokens.start, last - tokens.start))
                    )
        if not parts:
            return {}
        is_image = is_image.to(embeds.device)
        features = torch.cat([part.embeds for part in parts])
        embeds[is_image] = features.to(embeds.device, embeds.dtype)
        layers = [torch.cat(each) for each in zip(*(p.deepstack for p in parts), strict=True)]
        if not layers:
            return {}
        return {"visual_pos_masks": is_image, "deepstack_visual_embeds": layers}

    def decode(
        self, cache: SlotCache, ids: list[int], positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        """One token for each of the slots 0 to n; logits (n, vocabulary)."""
        if self._native:
            return self._native(cache, ids, positions, starts)
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
            attention_mask=self._mask(mask),
            position_ids=positions[None, :, None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._logits(hidden[:, -1])

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """To be added: from True and False each layer's attention would make this for itself."""
        added = torch.zeros_like(mask, dtype=self.layout.dtype)
        return added.masked_fill_(~mask, -torch.inf)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits
