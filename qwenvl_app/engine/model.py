"""The model: prefill and decode. With ``vision.py``, all that calls the model.

transformers' own code runs unchanged; what is done here is to call its parts with everything that
belongs to a request passed explicitly. Above all the positions: ``Qwen3VLModel`` would otherwise
keep ``rope_deltas``, the state of one request, on an object that all share (transformers #43952).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qwenvl_app.engine.compiled import ATTENTION, CompiledDecode
from qwenvl_app.engine.detokenizer import Detokenizer
from qwenvl_app.engine.kv_cache import Layout, SlotCache
from qwenvl_app.engine.memory import place
from qwenvl_app.engine.pixels import Patcher
from qwenvl_app.engine.recurrent import RecurrentCache, states_of
from qwenvl_app.engine.sequence import Features, Inputs, Sequence
from qwenvl_app.engine.vision import Encoding, Tower
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.generation import GenerationRequest
from qwenvl_app.prompts import PromptBuilder


@dataclass(frozen=True)
class LoadedModel:
    """A model and what turns requests into its inputs."""

    model: Any  # of a supported family, whose annotations admit no call of its parts
    image_processor: Any  # Qwen2VLImageProcessorPil
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder

    @cached_property
    def patcher(self) -> Patcher:
        """Of ``image_processor``. Raises ModelLoadError."""
        return Patcher(self.image_processor)

    def detokenizer(self) -> Detokenizer:
        """For one answer."""
        return Detokenizer(self.tokenizer, self.prompts.reasoning)


def prepare(loaded: LoadedModel, request: GenerationRequest) -> Inputs:
    """The inputs of one picture and talk about it, but for the pixels. On the request's thread."""
    [image] = request.images
    grid = loaded.patcher.grid(image)
    prompt = loaded.prompts.build(request.messages, [grid], request.tools, request.template_options)
    [image_tokens] = prompt.images
    positions = mrope_positions(len(prompt.input_ids), image_tokens, grid, loaded.patcher.merge)
    return Inputs(prompt.input_ids, positions, grid, image_tokens)


def mrope_positions(
    length: int, image: range, grid: tuple[int, int, int], merge: int
) -> torch.Tensor:
    """Positions (3, length) of a prompt with one picture, as ``Qwen3VLModel.get_rope_index``.

    Text counts on in all three dimensions; the picture's tokens are placed in time, rows and
    columns; the text after it goes on behind the larger of its sides.
    """
    time, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    placed = torch.cartesian_prod(torch.arange(time), torch.arange(rows), torch.arange(columns))
    after = image.start + max(rows, columns)
    return torch.cat(
        [
            torch.arange(image.start).expand(3, -1),
            placed.T + image.start,
            torch.arange(after, after + length - image.stop).expand(3, -1),
        ],
        dim=1,
    )


class Runner:
    """Calls of the model, in inference mode. Used by the engine's thread alone."""

    def __init__(self, model: Any, *, compiled: bool = False):
        self._model, self._text = model, model.model.language_model
        self._tower = Tower(model.model.visual)
        config = model.config.text_config
        if self._tower.visual.patch_embed.proj.weight.device.type == "meta":
            raise ModelLoadError(
                "the device has no room even for the vision tower: use a smaller or a quantised "
                "checkpoint"
            )
        devices = [place(layer.input_layernorm) for layer in self._text.layers]
        heads: int = config.num_key_value_heads
        states = states_of(self._text)
        for state in reversed(states):
            del devices[state.layer]
        self.layout = Layout(
            heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            self._text.embed_tokens.weight.dtype,
            tuple(devices),
            states,
        )
        # The eager attention adds its mask; all others take True and False.
        self._adds_mask = self._text.config._attn_implementation == "eager"
        self.max_length: int = config.max_position_embeddings
        self.depth = len(self._tower.visual.blocks)
        self.merge: int = self._tower.merge
        self._device = place(self._text.embed_tokens)
        if compiled and states:
            raise ModelLoadError(
                "QWENVL_COMPILE=on does not know this model's recurrent layers: set "
                "QWENVL_COMPILE=off"
            )
        self._compiled = CompiledDecode(self._step) if compiled else None
        if compiled and self._text.config._attn_implementation == "sdpa":
            self._text.set_attn_implementation(ATTENTION)
        places = {self.device, self._device, *(p.device for p in model.parameters())}
        if compiled and len(places) > 1:
            raise ModelLoadError(
                "QWENVL_COMPILE=on wants the whole model on one device: set QWENVL_COMPILE=off, or "
                "let QWENVL_DEVICE name one that has room for all of it"
            )

    @property
    def device(self) -> torch.device:
        """Where logits are."""
        return place(self._model.lm_head)

    def new_cache(self, budget: int) -> SlotCache:
        """An empty one, for up to ``budget`` tokens."""
        if self.layout.states:
            return RecurrentCache(self.layout)
        return SlotCache(self.layout, budget if self._compiled else 0)

    def encode(self, sequences: list[Sequence]) -> Encoding:
        """Begin the vision tower's work on the pictures of ``sequences``."""
        return Encoding(self._tower, sequences)

    def prefill(
        self, cache: SlotCache, sequences: list[Sequence], rows: Many[int], widths: Many[int]
    ) -> torch.Tensor:
        """Compute the next ``widths[i]`` prompt tokens of each; logits (sequences, vocabulary).

        The logits are those behind each sequence's last token of this call.
        """
        if self.layout.states and len(rows) > 1:  # what pads a row would be read
            each = zip(sequences, rows, widths, strict=True)
            return torch.cat([self.prefill(cache, [s], [row], [width]) for s, row, width in each])
        widest = max(widths)
        ids = torch.zeros(len(rows), widest, dtype=torch.long)
        positions = torch.zeros(3, len(rows), widest, dtype=torch.long)
        is_image = torch.zeros(len(rows), widest, dtype=torch.bool)
        parts: list[Features] = []
        for number, (sequence, width) in enumerate(zip(sequences, widths, strict=True)):
            inputs, start = sequence.inputs, sequence.computed
            ids[number, :width] = torch.tensor(inputs.ids[start : start + width])
            positions[:, number, :width] = inputs.positions[:, start : start + width]
            image = inputs.image_tokens
            first, last = max(image.start, start), min(image.stop, start + width)
            if first < last and sequence.features:
                is_image[number, first - start : last - start] = True
                here = slice(first - image.start, last - image.start)
                parts.append(
                    Features(
                        sequence.features.embeds[here],
                        [layer[here] for layer in sequence.features.deepstack],
                    )
                )
        embeds = self._text.embed_tokens(ids.to(self._device))
        visual: dict[str, Any] = {}
        if parts:
            is_image = is_image.to(self._device)
            features = torch.cat([part.embeds for part in parts])
            embeds[is_image] = features.to(embeds.device, embeds.dtype)
            layers = [torch.cat(each) for each in zip(*(p.deepstack for p in parts), strict=True)]
            if layers:
                visual = {"visual_pos_masks": is_image, "deepstack_visual_embeds": layers}
        mask = cache.begin(rows, [s.computed for s in sequences], widths)
        hidden = self._text(
            inputs_embeds=embeds,
            attention_mask=self._mask(mask),
            position_ids=positions.to(self._device),
            past_key_values=cache,
            use_cache=True,
            **visual,
        ).last_hidden_state
        ends = torch.tensor(widths, device=hidden.device) - 1
        return self._logits(hidden[torch.arange(len(rows), device=hidden.device), ends])

    def decode(
        self, cache: SlotCache, ids: list[int], positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        """One token for each of the rows 0 to n; logits (n, vocabulary)."""
        if self._compiled and self._compiled.takes(cache, len(ids)):
            return self._compiled(cache, ids, positions, starts)
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
        if not self._adds_mask:
            return mask
        dtype = self.layout.dtype
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return added.masked_fill_(~mask, torch.finfo(dtype).min)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits
