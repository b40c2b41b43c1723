"""What a checkpoint will take of memory, estimated from its configuration: nothing is loaded.

It decides whether the model can work at all, and is right within a fifth. Weights and what a token
keeps are those of the model on torch's device "meta"; what a patch of a picture takes for a moment
is a sum of what is alive in the tower's widest layer. On a GPU ``measuring.py`` puts what was
measured in the place of these sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl_app.engine.layout import layout_of
from qwenvl_app.engine.pixels import pixel_limits
from qwenvl_app.loading.checkpoint import Checkpoint
from qwenvl_app.loading.processing import image_processor
from qwenvl_app.loading.weights import weight_files
from qwenvl_app.settings import Settings


@dataclass(frozen=True)
class Footprint:
    """Bytes, unless it says otherwise."""

    parameters: int  # how many
    dtype: str  # what it is loaded in
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
    chunk_token: int = (
        0  # of a prompt, a token of one step: only measured, it is 1 % of the weights
    )


def estimate(
    checkpoint: Checkpoint, settings: Settings, *, stays_quantised: bool = False
) -> Footprint:
    """The footprint of ``checkpoint`` under ``settings``."""
    directory = checkpoint.directory
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    own = config.dtype or config.text_config.dtype or torch.float32
    auto: Any = AutoModelForImageTextToText  # it is not annotated
    with torch.device("meta"):
        model = auto.from_config(config, dtype=own if settings.dtype == "auto" else settings.dtype)
    text, size = model.model.language_model, model.dtype.itemsize
    parts = (model, model.lm_head, *text.layers)
    weights, *sizes = (sum(each.nbytes for each in part.parameters()) for part in parts)
    layer = max(sizes)
    if stays_quantised:
        stored = sum((directory / file).stat().st_size for file in weight_files(directory))
        weights, layer = stored, layer * stored // weights
    layout = layout_of(text)
    heads = 2 * text.config.num_attention_heads + layout.heads  # of keys and values; of keys alone
    least, largest = pixel_limits(image_processor(directory))
    pixels = int(max(least, min(settings.max_image_megapixels * 1e6, largest)))
    return Footprint(
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights,
        layer=layer,
        kv_token=layout.token_bytes,
        token=layout.token_bytes + heads * layout.head_dim * size,
        state=layout.bytes(0, 1),
        max_length=text.config.max_position_embeddings,
        **_picture(config, pixels, size, eager=settings.attention == "eager"),
    )


def _picture(config: Any, pixels: int, size: int, *, eager: bool) -> dict[str, int]:
    """Of a picture of so many pixels; ``size``: bytes of a number.

    In the tower a patch has the residual, its norm, learned positions, queries, keys and values,
    and the rotary embedding in float32; where attention is eager, something for each other patch.
    """
    vision = config.vision_config
    patches, merge = pixels // vision.patch_size**2, vision.spatial_merge_size**2
    taps = getattr(vision, "deepstack_visual_indexes", None) or ()
    features = (1 + len(taps)) * config.text_config.hidden_size * size // merge
    square = eager * patches * vision.num_heads * (2 * size + 4)
    return {
        "pixels": pixels,
        "patches": patches,
        "picture_tokens": patches // merge,
        "tower": patches * ((6 * size + 24) * vision.hidden_size + features + square),
        "features": patches * features,
    }
