"""What of a model decides how much its KV cache takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from qwenvl_app.engine.memory import place


@dataclass(frozen=True)
class StateShape:
    """Shape of what a recurrent layer keeps of one slot, see ``recurrent.py``."""

    layer: int
    inputs: tuple[int, int]  # channels, length of the kernel
    matrices: tuple[int, int, int]  # heads, sizes of a key and a value; in float32
    dtype: torch.dtype  # of the inputs
    device: torch.device

    @property
    def bytes(self) -> int:
        """What it takes."""
        return math.prod(self.inputs) * self.dtype.itemsize + math.prod(self.matrices) * 4


@dataclass(frozen=True)
class Layout:
    """Shape of the cache, from the model's configuration; ``devices``, one a layer.

    Those layers aside that have ``states`` instead of keys and values.
    """

    heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    states: tuple[StateShape, ...] = ()

    @property
    def attending(self) -> list[int]:
        """The layers that keep keys and values."""
        recurrent = {state.layer for state in self.states}
        return [n for n in range(len(self.devices) + len(recurrent)) if n not in recurrent]

    @property
    def token_bytes(self) -> int:
        """What one token of one sequence takes, in all layers."""
        return 2 * len(self.devices) * self.heads * self.head_dim * self.dtype.itemsize

    def bytes(self, tokens: int, slots: int) -> int:
        """What so many tokens in so many slots take."""
        return tokens * self.token_bytes + slots * sum(state.bytes for state in self.states)

    def tokens_in(self, memory: int, slots: int) -> int:
        """How many tokens so many slots may have in ``memory``, in bytes."""
        return max(0, memory - self.bytes(0, slots)) // self.token_bytes


def layout_of(text: Any) -> Layout:
    """Of ``text``, a language model. Its layers may be on several devices."""
    config = text.config
    states = tuple(
        StateShape(
            number,
            (mixer.conv_dim, mixer.conv_kernel_size),
            (mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim),
            mixer.conv1d.weight.dtype,
            place(mixer.conv1d),
        )
        for number, layer in enumerate(text.layers)
        if (mixer := getattr(layer, "linear_attn", None)) is not None
    )
    recurrent = {state.layer for state in states}
    devices = [place(each.input_layernorm) for each in text.layers]
    return Layout(
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        text.embed_tokens.weight.dtype,
        tuple(device for layer, device in enumerate(devices) if layer not in recurrent),
        states,
    )
