"""What a checkpoint will take of memory, estimated from its configuration: nothing is loaded.

It decides whether the model can work at all, and is right within a fifth. Weights and what a token
keeps are those of the model on torch's device "meta"; what a patch of a picture takes for a moment
is a sum of what is alive in its widest layer. A prompt's chunk is not estimated, it takes 1 % of
the weights. On a GPU ``measuring.py`` puts what was measured in the place of these sums.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl_app.engine.layout import layout_of
from qwenvl_app.engine.pixels import pixel_limits
from qwenvl_app.loading.checkpoint import Checkpoint
from qwenvl_app.loading.processing import image_processor
from qwenvl_app.loading.weights import weight_files


@dataclass(frozen=True)
class Footprint:
    """Bytes, unless it says otherwise."""

    parameters: int  # how many
    dtype: str  # what it is loaded in
    quantised: str | None  # how, if it is
    weights: int  # as they lie in memory
    layer: int  # of them, the largest part that goes to one device as a whole
    kv_token: int  # of the KV cache, a token
    token: int  # the same while it is attended to, and while the cache grows
    state: int  # a request: what layers keep that have no keys and values
    max_length: int  # tokens
    pixels: int  # of the largest picture, as the model gets it
    patches: int  # the same, how many
    picture_tokens: int  # the same, how many
    tower: int  # the same, at most at once in the vision tower, with its features
    features: int  # the same, from there until it is prefilled
    eager: bool = False  # attention without a fused kernel, whose memory is a square
    chunk_token: int = 0  # of a prompt, a token of one step: only measured

    def at(self, pixels: float) -> Footprint:
        """The same, where the largest picture has so many."""
        share = min(1.0, pixels / self.pixels)
        linear = ("pixels", "patches", "picture_tokens", "features")
        smaller: dict[str, Any] = {name: int(share * getattr(self, name)) for name in linear}
        return replace(self, tower=int(share ** (1 + self.eager) * self.tower), **smaller)


def estimate(
    checkpoint: Checkpoint,
    dtype: str,
    max_pixels: float,
    *,
    cpu: bool = True,
    eager: bool = False,
    expands_fp8: bool = True,
) -> Footprint:
    """The footprint of ``checkpoint``.

    ``dtype`` as in the settings; ``max_pixels``: the service's own limit on pictures; ``cpu``: it
    runs there; ``eager``: so does attention; ``expands_fp8``: fp8 is turned to ``dtype``.
    """
    directory = checkpoint.directory
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    text, vision = config.text_config, config.vision_config
    own = config.dtype or text.dtype or torch.float32
    kind: torch.dtype = own if dtype == "auto" else getattr(torch, dtype)
    size, model = kind.itemsize, _empty_model(config, kind)
    layout = layout_of(model.model.language_model)
    heads = 2 * text.num_attention_heads + layout.heads  # of keys and values; of keys, to grow
    least, largest = pixel_limits(image_processor(directory))
    pixels = int(max(least, min(max_pixels, largest)))
    back = ("compressed-tensors", *["fp8"] * expands_fp8)
    weights, layer = _weights(checkpoint, model, back, packed=cpu and size == 4)
    return Footprint(
        parameters=sum(each.numel() for each in model.parameters()),
        dtype=str(kind).removeprefix("torch."),
        quantised=checkpoint.quantised,
        weights=weights,
        layer=layer,
        kv_token=layout.token_bytes,
        token=layout.token_bytes + heads * layout.head_dim * size,
        state=layout.bytes(0, 1),
        max_length=text.max_position_embeddings,
        pixels=pixels,
        **_picture(vision, pixels, text.hidden_size * size, size, cpu=cpu, eager=eager),
    )


def _empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model without its weights."""
    auto: Any = AutoModelForImageTextToText  # it is not annotated
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


def _weights(
    checkpoint: Checkpoint, model: Any, back: Collection[str], *, packed: bool
) -> tuple[int, int]:
    """What all take, and the largest part that goes to one device as a whole.

    ``model`` is what they become as they are loaded, but for those that stay quantised: they take
    what their files do. ``back``: methods of which none stays so. ``packed``: see engine/fused.py.
    """
    text, head = model.model.language_model, model.lm_head
    weights, *parts = (
        sum(each.nbytes for each in module.parameters()) for module in (model, head, *text.layers)
    )
    if checkpoint.quantised not in (None, *back):
        directory = checkpoint.directory
        stored = sum((directory / file).stat().st_size for file in weight_files(directory))
        return stored, max(parts) * stored // weights
    # A head that is the embedding too is laid out anew, and the embedding stays.
    twice = packed and head.weight is text.embed_tokens.weight
    return weights + twice * parts[0], max(parts)


def _picture(
    vision: Any, pixels: int, token: int, size: int, *, cpu: bool, eager: bool
) -> dict[str, Any]:
    """Of a picture of so many pixels; ``token``: bytes of its hidden state, ``size``: of a number.

    In the tower a patch has the residual, its norm, learned positions, queries, keys and values,
    and the rotary embedding in float32; a CPU turns the positions that it weighs to that first.
    Where attention has no fused kernel, each patch has something for each other too.
    """
    patches, merge = pixels // vision.patch_size**2, vision.spatial_merge_size**2
    taps = getattr(vision, "deepstack_visual_indexes", None) or ()
    features = (1 + len(taps)) * token // merge
    patch = max(6 * size + 24, 44 * cpu) * vision.hidden_size + features
    square = vision.num_heads * (2 * size + 4) * eager
    return {
        "patches": patches,
        "picture_tokens": patches // merge,
        "tower": patches * (patch + patches * square),
        "features": patches * features,
        "eager": eager,
    }
