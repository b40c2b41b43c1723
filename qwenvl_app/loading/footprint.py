"""What a checkpoint will take of memory, from its files' headers: nothing is loaded for it.

Each figure is a sum of parts that can be pointed at in the code that allocates them;
``tests/e2e/test_memory.py`` holds the sums against processes that were measured.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenvl_app.engine import cpu as cpu_layout
from qwenvl_app.engine.pixels import pixel_limits
from qwenvl_app.loading.checkpoint import Checkpoint
from qwenvl_app.loading.processing import image_processor
from qwenvl_app.loading.weights import weight_files

_FLOATS = ("F64", "F32", "BF16", "F16")  # what ``dtype`` converts
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = {  # others take one byte
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
}
# Tables of a vocabulary and its merges, in Rust and in Python, and what reading them leaves behind
# take so many times the bytes of tokenizer.json. Measured with the published one, 11 MB.
_TOKENIZER = 12
_LAYER = re.compile(r".*\blayers\.\d+\.")
_LINEAR = "linear_attention"  # with a state of fixed size in place of keys and values


@dataclass(frozen=True)
class Tower:
    """What the vision tower takes, in bytes a patch: for a moment, and until it is prefilled."""

    patch: int
    features: int
    square: int  # times the square of the patches: attention that is no fused kernel

    def peak(self, patches: int) -> int:
        """For a picture of so many patches, its features included."""
        return patches * (self.patch + patches * self.square)


@dataclass(frozen=True)
class Footprint:
    """Bytes, unless it says otherwise."""

    parameters: int  # how many
    dtype: str  # what it is loaded in
    weights: int  # as they lie in memory
    layers: int  # of them, those of the language model's layers
    layer: int  # the largest of these, or of the tensors outside: what is not divided
    unread: int  # of the weights: rows of the embedding, which are read as their tokens occur
    repacked: int  # what engine/cpu.py lays out and leaves, too, on a CPU in float32
    read: int  # of the files, to lay it out: mapped still, but given back when memory is wanted
    tokenizer: int
    kv_token: int  # of the KV cache, a token
    attention_token: int  # beside it, for a moment: one layer's keys and values for all heads
    state: int  # a request: what layers keep that have no keys and values
    chunk_token: int  # of a prompt, a token of one step
    max_length: int  # tokens
    patches: int  # of the largest picture, how many
    picture_tokens: int  # the same in tokens
    pixels: int  # the same in pixels
    tower: Tower
    quantised: str | None = None

    @property
    def token(self) -> int:
        """What a token takes while it is attended to; a layer's keys are there twice to grow."""
        return self.kv_token + self.attention_token

    def at(self, pixels: float) -> Footprint:
        """The same, where the largest picture has so many."""
        share = min(1.0, pixels / self.pixels)
        patches, tokens = int(share * self.patches), int(share * self.picture_tokens)
        return replace(
            self, patches=patches, picture_tokens=tokens, pixels=int(share * self.pixels)
        )


def measure(
    checkpoint: Checkpoint,
    dtype: str,
    max_pixels: float,
    *,
    cpu: bool = True,
    eager: bool = False,
    expands_fp8: bool | None = None,
) -> Footprint:
    """The footprint of ``checkpoint``.

    ``dtype`` as in the settings; ``max_pixels`` is the service's own limit on pictures. ``cpu``: it
    runs there; ``eager``: so does attention; ``expands_fp8``: what is stored in fp8 is turned to
    ``dtype``, as transformers does where no kernel can multiply it (default: on a CPU).
    """
    directory, text, vision = (
        checkpoint.directory,
        checkpoint.text,
        checkpoint.config["vision_config"],
    )
    dtype = _dtype(checkpoint.config, text) if dtype == "auto" else dtype
    size = _SIZES[dtype]
    side, merged = vision["patch_size"], vision.get("spatial_merge_size", 2) ** 2
    pixels = _pixels(image_processor(directory), max_pixels)
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    keys = 2 * text["num_key_value_heads"] * head * size  # and values, of a token in a layer
    attending = sum(kind != _LINEAR for kind in _layers(text))
    return Footprint(
        dtype=dtype,
        **_weights(checkpoint, size, cpu=cpu, expands_fp8=expands_fp8),
        tokenizer=_TOKENIZER * _length(directory / "tokenizer.json"),
        kv_token=attending * keys,
        attention_token=2 * heads * head * size + keys // 2,
        state=_state(text, size),
        chunk_token=_chunk_token(text, size),
        max_length=text["max_position_embeddings"],
        patches=pixels // side**2,
        picture_tokens=pixels // side**2 // merged,
        pixels=pixels,
        tower=_tower(vision, text["hidden_size"] // merged, size, cpu=cpu, eager=eager),
        quantised=checkpoint.quantised,
    )


def _weights(
    checkpoint: Checkpoint, size: int, *, cpu: bool, expands_fp8: bool | None
) -> dict[str, int]:
    """What is known of them from the headers alone."""
    config, text = checkpoint.config, checkpoint.text
    expands = cpu if expands_fp8 is None else expands_fp8
    parameters, undivided = 0, Counter[str]()
    embedding = unread = mapped = 0
    for name, count, stored in _tensors(checkpoint.directory):
        taken = count * _in_memory(stored, size, checkpoint, expands_fp8=expands)
        parameters += count
        layer = _LAYER.match(name)
        undivided[layer[0] if layer else name] += taken
        as_it_is = cpu and stored in _FLOATS and size == _STORED[stored]
        mapped += taken * as_it_is
        if name.endswith("embed_tokens.weight"):
            embedding, unread = taken, taken * as_it_is
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    unread = 0 if tied else unread
    packed = cpu and size == 4
    return {
        "parameters": parameters,
        "weights": undivided.total(),
        "layers": sum(taken for name, taken in undivided.items() if _LAYER.match(name)),
        "layer": max(undivided.values(), default=0),
        "unread": unread,
        "repacked": embedding if packed and tied and embedding // size >= cpu_layout.LEAST else 0,
        "read": mapped - unread if packed else 0,
    }


def _pixels(processor: Any, most: float) -> int:
    """Of the largest picture, as the model gets it."""
    least, largest = pixel_limits(processor)
    return int(max(least, min(most, largest)))


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    own = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    return own if own in _SIZES else "float32"


def _in_memory(stored: str, size: int, checkpoint: Checkpoint, *, expands_fp8: bool) -> int:
    """Bytes of an element that is stored so, once the model runs."""
    if stored in _FLOATS:
        return size
    method = checkpoint.quantised
    if method == "compressed-tensors":  # which are taken apart at the first step
        groups = checkpoint.config["quantization_config"].get("config_groups") or {}
        bits = [(group.get("weights") or {}).get("num_bits", 8) for group in groups.values()]
        return 32 // min(bits, default=8) * size if stored == "I32" else size
    if method == "fp8" and expands_fp8 and stored.startswith("F8"):
        return size
    return _STORED.get(stored, 1)


def _layers(text: dict[str, Any]) -> list[str]:
    """What each layer attends with. The cache keeps all tokens, whatever their window is."""
    kinds: list[str] = text.get("layer_types") or ["full_attention"] * text["num_hidden_layers"]
    return kinds


def _state(text: dict[str, Any], size: int) -> int:
    """What the gated delta layers of Qwen3.5 keep of a request: a matrix a head, in float32."""
    linear = sum(kind == _LINEAR for kind in _layers(text))
    if not linear:
        return 0
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    convolved = (2 * keys + values) * text["linear_conv_kernel_dim"] * size
    return linear * int(4 * values * text["linear_key_head_dim"] + convolved)


def _chunk_token(text: dict[str, Any], size: int) -> int:
    """Hidden states, queries and the MLP's three products; of a mixture, those of its experts."""
    inner = text.get("intermediate_size") or 0
    experts = text.get("num_experts_per_tok", 0) * text.get("moe_intermediate_size", 0)
    return int((3 * max(inner, experts) + 8 * text["hidden_size"]) * size)


def _tower(vision: dict[str, Any], merged: int, size: int, *, cpu: bool, eager: bool) -> Tower:
    """Measured on a CPU, at the 8B model's sizes and at a quarter of them, within a sixth.

    ``merged``: what a patch has in the language model's hidden state.
    """
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    deepstack = len(vision.get("deepstack_visual_indexes") or ())
    tapped = merged * size * deepstack  # by the last layer; then comes what that gives
    features = tapped + merged * size
    # The residual, its norm, queries, keys and values; the rotary embedding is in float32.
    attention = 5 * hidden * size + 6 * hidden * 4
    gated = vision.get("hidden_act") == "silu"
    mlp = 2 * hidden * size + (3 if gated else 2) * inner * size
    # Learned positions, four of which are weighed in float32; a CPU converts them first.
    positions = 5 * hidden * size + 4 * hidden * 4 * (2 if cpu and size < 4 else 1)
    learned = hidden * size if vision.get("num_position_embeddings") else 0  # kept meanwhile
    embedding = (positions if learned else hidden * size) + 3 * vision["patch_size"] ** 2 * size
    heads = vision.get("num_heads", 0)
    return Tower(
        patch=max(embedding, max(attention, mlp) + learned + tapped, features),
        features=features,
        square=heads * (2 * size + 4) if eager else 0,
    )


def _tensors(directory: Path) -> Iterator[tuple[str, int, str]]:
    """(name, elements, stored type) of every tensor: a length of 8 bytes, then JSON."""
    for file in weight_files(directory):
        with (directory / file).open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, math.prod(tensor["shape"]), tensor["dtype"]


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
