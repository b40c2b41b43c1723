"""A request as the model takes it. Made on the request's thread, tensors on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
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
    positions = mrope_positions(len(prompt.input_ids), places, patcher.merge)
    spans = [Span(*place) for place in places]
    return Inputs(
        prompt.input_ids, positions, spans, reasoning=prompt.reasoning, owner=request.owner
    )


def mrope_positions(
    length: int, pictures: Iterable[tuple[range, Grid]], merge: int
) -> torch.Tensor:
    """M-RoPE positions (3, length) of a prompt, as ``Qwen3VLModel.get_rope_index``.

    ``pictures``: where the tokens of each are, in order, and its patches, of which ``merge`` a side
    make a token. Text counts on in all three dimensions; a picture's tokens are placed in time,
    rows and columns; what comes after it goes on after the larger of its sides.
    """
    positions = np.empty((3, length), np.int64)
    end = following = 0
    for tokens, grid in pictures:
        text = tokens.start - end
        positions[:, end : tokens.start] = np.arange(following, following + text)
        following += text
        time, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        placed = np.indices((time, rows, columns)).reshape(3, -1)
        positions[:, tokens.start : tokens.stop] = placed + following
        following += max(rows, columns)
        end = tokens.stop
    positions[:, end:] = np.arange(following, following + length - end)
    return torch.from_numpy(positions)
