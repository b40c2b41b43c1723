"""A request as the model takes it. Made on the request's thread, tensors on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import torch

from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.pixels import Grid
from qwenvl_app.engine.prefix_cache import Text
from qwenvl_app.generation import GenerationRequest
from qwenvl_app.prompts.builder import Reasoning


@dataclass
class Features:
    """What the vision tower made of one picture, as the language model takes it.

    ``embeds`` (image tokens, hidden) and, for the first layers of the language model, DeepStack's
    additions of the same shape.
    """

    embeds: torch.Tensor
    deepstack: list[torch.Tensor]

    def part(self, tokens: slice) -> Features:
        """Of some of the picture's tokens."""
        return Features(self.embeds[tokens], [layer[tokens] for layer in self.deepstack])


@dataclass
class Span:
    """A picture in a prompt: ``tokens`` are the places in its ids that the features go to.

    ``key``: equal for equal pictures that are scaled alike, b"" if nothing is shared. ``pixels``
    (see ``pixels.Patcher``) go once there are ``features``, and these once they are in the cache.
    """

    tokens: range
    grid: Grid
    key: bytes = b""
    pixels: torch.Tensor | None = None
    features: Features | None = None

    @property
    def patches(self) -> int:
        """In the vision tower."""
        return math.prod(self.grid)


@dataclass
class Inputs:
    """A prompt: its ids, their positions, and the pictures in it, in order.

    ``prefix_key``: equal for those of one owner that begin alike, up to the last picture; None if
    nothing is shared. ``boundary``: tokens at which a step of its prefill has to end, if it comes
    by there.
    """

    ids: list[int]
    positions: torch.Tensor  # (3, tokens): temporal, vertical, horizontal
    images: list[Span] = field(default_factory=list)
    prefix_key: bytes | None = None
    boundary: int = 0
    reasoning: Reasoning | None = None  # see ``Prompt``
    owner: str = ""  # see ``GenerationRequest``

    @property
    def images_end(self) -> int:
        """Tokens up to the end of the last picture; 0 if there is none."""
        return self.images[-1].tokens.stop if self.images else 0

    def text(self, answer: Many[int] = ()) -> Text:
        """The prompt, and what was answered, as ``PrefixCache`` compares them."""
        marks = ((image.tokens.start, image.key) for image in self.images)
        return Text.of([*self.ids, *answer], marks, self.owner)


def prepare(loaded: LoadedModel, request: GenerationRequest) -> Inputs:
    """The inputs of ``request``, but for the pixels."""
    patcher = loaded.patcher.within(*request.pixels)
    grids = [patcher.grid(image) for image in request.images]
    prompt = loaded.prompts.build(request.messages, grids, request.tools, request.template_options)
    places = list(zip(prompt.images, grids, strict=True))
    positions = _positions(loaded.model.model, prompt.input_ids, places)
    spans = [Span(*place) for place in places]
    return Inputs(
        prompt.input_ids, positions, spans, reasoning=prompt.reasoning, owner=request.owner
    )


def _positions(model: Any, ids: list[int], pictures: list[tuple[range, Grid]]) -> torch.Tensor:
    """M-RoPE positions (3, tokens); ``pictures``: where the tokens of each are, and its patches."""
    kinds = torch.zeros(1, len(ids), dtype=torch.int)
    for tokens, _ in pictures:
        kinds[0, tokens.start : tokens.stop] = 1
    grids = torch.tensor([grid for _, grid in pictures])
    positions: torch.Tensor = model.get_rope_index(torch.tensor([ids]), kinds, grids)[0]
    return positions[:, 0]
