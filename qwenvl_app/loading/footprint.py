"""What a checkpoint will take of memory, estimated from its files' headers: nothing is loaded.

It decides whether the model can work at all. What a token keeps is read from the model's layers on
torch's device "meta". What the vision tower and a prefill take for a moment is a sum of what is
alive in their widest layer; on a GPU ``measuring.py`` puts what was measured in its place.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl_app.engine.layout import layout_of
from qwenvl_app.engine.pixels import pixel_limits
from qwenvl_app.loading.checkpoint import Checkpoint
from qwenvl_app.loading.processing import image_processor
from qwenvl_app.loading.weights import weight_files

_FLOATS = ("F64", "F32", "BF16", "F16")  # what ``dtype`` converts
_STORED = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # others: 1 byte
# Tables of a vocabulary and its merges, in Rust and in Python, and what reading them leaves behind
# take so many times the bytes of tokenizer.json. Measured with the published one, 11 MB.
_TOKENIZER = 12
_LAYER = re.compile(r".*\blayers\.\d+\.")


@dataclass(frozen=True)
class Footprint:
    """Bytes, unless it says otherwise."""

    parameters: int  # how many
    dtype: str  # what it is loaded in
    quantised: str | None  # how, if it is
    weights: int  # as they lie in memory
    layer: int  # of them, the largest part that goes to one device as a whole
    tokenizer: int
    kv_token: int  # of the KV cache, a token
    token: int  # the same while it is attended to, and while the cache grows
    state: int  # a request: what layers keep that have no keys and values
    chunk_token: int  # of a prompt, a token of one step
    max_length: int  # tokens
    pixels: int  # of the largest picture, as the model gets it
    patches: int  # the same, how many
    picture_tokens: int  # the same, how many
    tower: int  # the same, at most at once in the vision tower, with its features
    features: int  # the same, from there until it is prefilled
    eager: bool = False  # attention without a fused kernel, whose memory is a square

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

    ``dtype`` as in the settings; ``max_pixels`` is the service's own limit on pictures. ``cpu``: it
    runs there; ``eager``: so does attention; ``expands_fp8``: what is stored in fp8 is turned to
    ``dtype``, as transformers does where no kernel can multiply it.
    """
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    text, vision = config.text_config, config.vision_config
    own = config.dtype or text.dtype or torch.float32
    kind: torch.dtype = own if dtype == "auto" else getattr(torch, dtype)
    size, auto = kind.itemsize, cast("Any", AutoModelForImageTextToText)  # it is not annotated
    with torch.device("meta"):
        layout = layout_of(auto.from_config(config, dtype=kind).model.language_model)
    heads = 2 * text.num_attention_heads + layout.heads  # of keys and values; of keys, to grow
    least, largest = pixel_limits(image_processor(checkpoint.directory))
    pixels = int(max(least, min(max_pixels, largest)))
    tokenizer = checkpoint.directory / "tokenizer.json"
    return Footprint(
        dtype=str(kind).removeprefix("torch."),
        quantised=checkpoint.quantised,
        **_weights(checkpoint, size, packed=cpu and size == 4, expands_fp8=expands_fp8),
        tokenizer=_TOKENIZER * tokenizer.stat().st_size if tokenizer.is_file() else 0,
        kv_token=layout.token_bytes,
        token=layout.token_bytes + heads * layout.head_dim * size,
        state=layout.bytes(0, 1),
        chunk_token=_chunk_token(text, size),
        max_length=text.max_position_embeddings,
        pixels=pixels,
        **_picture(vision, pixels, text.hidden_size, size, cpu=cpu, eager=eager),
        eager=eager,
    )


def _chunk_token(text: Any, size: int) -> int:
    """Hidden states, queries and the MLP's three products; of a mixture, those of its experts."""
    experts = getattr(text, "num_experts_per_tok", 0) * getattr(text, "moe_intermediate_size", 0)
    inner = max(getattr(text, "intermediate_size", 0), experts)
    return int((3 * inner + 8 * text.hidden_size) * size)


def _picture(
    vision: Any, pixels: int, width: int, size: int, *, cpu: bool, eager: bool
) -> dict[str, int]:
    """Of a picture of so many pixels; ``width`` is the language model's."""
    patches, merge = pixels // vision.patch_size**2, vision.spatial_merge_size**2
    # Of a patch: DeepStack's and the merger's; before, the residual, its norm, learned positions,
    # queries, keys and values, and the rotary embedding in float32. A CPU turns the positions that
    # it weighs to float32 first.
    merged, taps = width * size // merge, getattr(vision, "deepstack_visual_indexes", None) or ()
    features = (1 + len(taps)) * merged
    patch = max((6 * size + 24) * vision.hidden_size + features - merged, features)
    if cpu and size < 4 and hasattr(vision, "num_position_embeddings"):
        patch = max(patch, 44 * vision.hidden_size)
    square = vision.num_heads * (2 * size + 4) if eager else 0
    return {
        "patches": patches,
        "picture_tokens": patches // merge,
        "tower": patches * (patch + patches * square),
        "features": patches * features,
    }


def _weights(
    checkpoint: Checkpoint, size: int, *, packed: bool, expands_fp8: bool
) -> dict[str, int]:
    """What is known of them from the headers alone."""
    parameters, parts = 0, Counter[str]()
    for name, count, stored in _tensors(checkpoint.directory):
        layer = _LAYER.match(name)
        each = _in_memory(stored, size, checkpoint, expands_fp8=expands_fp8)
        parts[layer[0] if layer else name] += count * each
        parameters += count
    tied = (checkpoint.text | checkpoint.config).get("tie_word_embeddings") and packed
    again = sum(parts[n] for n in parts if tied and n.endswith("embed_tokens.weight"))
    weights = parts.total() + again  # the head is laid out anew, and the embedding stays
    return {"parameters": parameters, "weights": weights, "layer": max(parts.values(), default=0)}


def _in_memory(stored: str, size: int, checkpoint: Checkpoint, *, expands_fp8: bool) -> int:
    """Bytes of an element that is stored so, once the model runs."""
    if checkpoint.quantised == "compressed-tensors" and stored == "I32":
        groups = checkpoint.config["quantization_config"].get("config_groups") or {}
        bits = [(group.get("weights") or {}).get("num_bits", 8) for group in groups.values()]
        return 32 // min(bits, default=8) * size  # they are taken apart at the first step
    expands = checkpoint.quantised == "compressed-tensors" or stored in _FLOATS
    if expands or (checkpoint.quantised == "fp8" and expands_fp8 and stored.startswith("F8")):
        return size
    return _STORED.get(stored, 1)


def _tensors(directory: Path) -> Iterator[tuple[str, int, str]]:
    """(name, elements, stored type) of every tensor: a length of 8 bytes, then JSON."""
    for file in weight_files(directory):
        with (directory / file).open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, math.prod(tensor["shape"]), tensor["dtype"]
