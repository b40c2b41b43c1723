"""The cache of a model some of whose layers are recurrent, as Qwen3.5's linear attention is.

Such a layer keeps of a slot what it has read so far, in two tensors: the last inputs of a short
convolution, and a matrix for each head. There is nothing in them that could be masked or written
over later, as keys and values can: each token has to be read exactly once. So prompts are prefilled
one by one, without padding (``runner.py``); a slot that only has its row in a call reads nothing
(``kept``); and a prefix has to be copied at its very end (``Inputs.boundary``).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch

from qwenvl_app.engine.kv_cache import UNBOUNDED, Layers, SlotCache, resized
from qwenvl_app.engine.layout import Layout


class RecurrentCache(SlotCache):
    """See ``SlotCache``; of the recurrent layers there is a state for every slot of it."""

    def __init__(self, layout: Layout):
        super().__init__(layout)
        self._called = slice(0)  # the slots of the call that is under way
        self._kept: list[int] = []  # of them, those whose state is to stay

    def fit(self, slots: int, length: int, most: int = UNBOUNDED) -> None:
        """See ``SlotCache``."""
        super().fit(slots, length, most)
        there = len(self._keys[0]) if slots else 0  # a state is large, whatever the length
        for layer, (inputs, matrices) in self._states.items():
            if len(inputs) != there:
                self._states[layer] = (
                    resized(inputs, (there, *inputs.shape[1:])),
                    resized(matrices, (there, *matrices.shape[1:])),
                )

    def reset(self) -> None:
        """See ``SlotCache``."""
        super().reset()
        self._states = {
            state.layer: (
                torch.zeros(0, *state.inputs, dtype=state.dtype, device=state.device),
                torch.zeros(0, *state.matrices, dtype=torch.float32, device=state.device),
            )
            for state in self.layout.states
        }

    def save(self, slot: int, length: int, start: int = 0) -> Layers:
        """See ``SlotCache``; after keys and values come the states, which are those of now."""
        states = self._states.values()
        copies = [(inputs[slot].clone(), matrices[slot].clone()) for inputs, matrices in states]
        return super().save(slot, length, start) + copies

    def restore(self, slot: int, saved: Layers, start: int = 0, length: int = UNBOUNDED) -> None:
        """See ``SlotCache``."""
        super().restore(slot, saved[: len(self._keys)], start, length)
        for states, old in zip(self._states.values(), saved[len(self._keys) :], strict=True):
            for tensor, state in zip(states, old, strict=True):
                tensor[slot].copy_(state)

    @contextmanager
    def kept(self, slots: list[int]) -> Iterator[None]:
        """See ``SlotCache``.

        Matrices are not written. Inputs are, by layers that change them in place; they are small.
        """
        inputs = [inputs for inputs, _ in self._states.values()]
        copies = [[tensor[slot].clone() for tensor in inputs] for slot in slots]
        self._kept = slots
        try:
            yield
        finally:
            self._kept = []
        for slot, copy in zip(slots, copies, strict=True):
            for tensor, kept in zip(inputs, copy, strict=True):
                tensor[slot].copy_(kept)

    def begin(self, slots: Many[int], starts: Many[int], widths: Many[int]) -> torch.Tensor:
        """See ``SlotCache``. Slots side by side, and rows of one width."""
        self._called = slice(slots[0], slots[-1] + 1)
        for slot, start in zip(slots, starts, strict=True):
            if start == 0:  # nothing has been read yet, by whoever has the slot now
                for inputs, matrices in self._states.values():
                    inputs[slot].zero_()
                    matrices[slot].zero_()
        return super().begin(slots, starts, widths)

    # What transformers' layers call.

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never: no token is taken back."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """The last inputs (rows, channels, kernel); it may be changed in place."""
        return self._states[layer_idx][0][self._called]

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_kwargs: Any
    ) -> torch.Tensor:
        """Keep the last of the new inputs (rows, channels, tokens); returns old and new ones."""
        kept = self.get_conv_state(layer_idx)
        inputs = torch.cat([kept, conv_states], dim=-1)
        kept.copy_(inputs[..., -kept.shape[-1] :])
        return inputs

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor:
        """The matrices (rows, heads, key, value)."""
        return self._states[layer_idx][1][self._called]

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_kwargs: Any
    ) -> torch.Tensor:
        """Keep the new matrices, but for slots that stay as they are."""
        matrices = self.get_recurrent_state(layer_idx)
        if not self._kept:
            return matrices.copy_(recurrent_states)
        for slot, old, new in zip(count(self._called.start), matrices, recurrent_states):
            if slot not in self._kept:
                old.copy_(new)
        return matrices

    def _tensors(self) -> list[torch.Tensor]:
        return [*super()._tensors(), *(each for pair in self._states.values() for each in pair)]
