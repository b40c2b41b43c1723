"""What a checkpoint will take of memory, from its files' headers: nothing is loaded for it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_app.loading.weights import weight_files

_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # what ``dtype`` converts
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Footprint:
    """Bytes, but for ``parameters``, ``max_length`` and ``picture_tokens``.

    ``dtype`` is what it is loaded in; ``kv_token`` what a token takes in the KV cache. Of the
    largest picture: ``picture_tokens`` and what the vision tower takes for a moment, roughly.
    """

    parameters: int
    dtype: str
    weights: int
    kv_token: int
    max_length: int
    picture_tokens: int
    vision: int

    def kv(self, requests: int, new_tokens: int) -> int:
        """For so many requests about the largest picture, with a prompt of 1,000 tokens."""
        tokens = min(self.picture_tokens + 1000 + new_tokens, self.max_length)
        return requests * tokens * self.kv_token


def measure(directory: Path, dtype: str, max_pixels: float) -> Footprint:
    """The footprint of a checkpoint that ``checkpoint.check`` has found whole.

    ``dtype`` as in the settings; ``max_pixels`` is the service's own limit on pictures.
    """
    config = _json(directory / "config.json")
    text, vision = config["text_config"], config["vision_config"]
    if dtype == "auto":
        own = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
        dtype = own if own in _SIZES else "float32"
    size = _SIZES[dtype]
    parameters = weights = 0
    for file in weight_files(directory):
        for count, stored in _tensors(directory / file):
            parameters += count
            weights += count * (size if stored in _FLOATS else 1)
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    largest = _json(directory / "preprocessor_config.json").get("size", {}).get("longest_edge")
    side = vision["patch_size"]
    patches = int(min(max_pixels, largest or max_pixels)) // side**2
    return Footprint(
        parameters,
        dtype,
        weights,
        2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head * size,
        text["max_position_embeddings"],
        patches // vision["spatial_merge_size"] ** 2,
        # Measured at the 8B model's sizes, bfloat16, on a CPU: 53 KB a patch, hidden states many
        # times over (the rotary embedding is in float32) and the MLP's two halves.
        patches * size * (16 * vision["hidden_size"] + 2 * vision["intermediate_size"])
        # What comes out of it, for the first layer and for each that DeepStack adds to.
        + patches
        // vision["spatial_merge_size"] ** 2
        * size
        * text["hidden_size"]
        * (1 + len(vision.get("deepstack_visual_indexes", ()))),
    )


def _tensors(file: Path) -> list[tuple[int, str]]:
    """(elements, stored type) of every tensor: a length of 8 bytes, then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [
        (math.prod(tensor["shape"]), tensor["dtype"])
        for name, tensor in header.items()
        if name != "__metadata__"
    ]


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
