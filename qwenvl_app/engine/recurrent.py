"""The cache of a model some of whose layers are recurrent, as Qwen3.5's linear attention is.

Such a layer keeps of a row what it has read so far, in two tensors: the last inputs of a short
convolution, and a matrix for each head. There is nothing in them that could be masked or written
over later, as keys and values can: each token has to be read exactly once. So rows are prefilled
one by one, without padding (``model.py``); a row that only has its place in a call reads nothing
(``kept``); and a prefix has to be copied at its very end (``Inputs.boundary``).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch

from qwenvl_app.engine.kv_cache import UNBOUNDED, Layers, SlotCache
from qwenvl_app.engine.layout import Layout, State


class RecurrentCache(SlotCache):
    """See ``SlotCache``; of the recurrent layers there is a state for every row of it."""

    def __init__(self, layout: Layout):
        super().__init__(layout)
        self._states = {state.layer: _empty(state) for state in layout.states}
        layers = range(len(layout.devices) + len(layout.states))
        attending = [layer for layer in layers if layer not in self._states]
        self._places = {layer: place for place, layer in enumerate(attending)}
        self._called = slice(0)  # the rows of the call that is under way
        self._kept: list[int] = []  # of them, those whose state is to stay

    @property
    def bytes(self) -> int:
        """See ``SlotCache``."""
        return super().bytes + sum(t.numel() * t.element_size() for t in self._all())

    def fit(self, rows: int, length: int, most: int = UNBOUNDED) -> None:
        """See ``SlotCache``."""
        super().fit(rows, length, most)
        there = len(self._keys[0]) if rows else 0  # a state is large, whatever the length
        for layer, (inputs, matrices) in self._states.items():
            if len(inputs) != there:
                self._states[layer] = _resized(inputs, there), _resized(matrices, there)

    def reset(self) -> None:
        """See ``SlotCache``."""
        super().reset()
        self._states = {state.layer: _empty(state) for state in self.layout.states}

    def move(self, source: int, target: int) -> None:
        """See ``SlotCache``."""
        super().move(source, target)
        for tensor in self._all():
            if source < len(tensor):
                tensor[target].copy_(tensor[source])

    def save(self, row: int, length: int, start: int = 0) -> Layers:
        """See ``SlotCache``; after keys and values come the states, which are those of now."""
        states = self._states.values()
        copies = [(inputs[row].clone(), matrices[row].clone()) for inputs, matrices in states]
        return super().save(row, length, start) + copies

    def restore(self, row: int, saved: Layers, start: int = 0, length: int = UNBOUNDED) -> None:
        """See ``SlotCache``."""
        super().restore(row, saved[: len(self._keys)], start, length)
        states = (tensor for pair in saved[len(self._keys) :] for tensor in pair)
        for tensor, state in zip(self._all(), states, strict=True):
            tensor[row].copy_(state)

    @contextmanager
    def kept(self, rows: list[int]) -> Iterator[None]:
        """See ``SlotCache``.

        Matrices are not written. Inputs are, by layers that change them in place; they are small.
        """
        inputs = [inputs for inputs, _ in self._states.values()]
        copies = [[tensor[row].clone() for tensor in inputs] for row in rows]
        self._kept = rows
        try:
            yield
        finally:
            self._kept = []
        for row, copy in zip(rows, copies, strict=True):
            for tensor, kept in zip(inputs, copy, strict=True):
                tensor[row].copy_(kept)

    def begin(self, rows: Many[int], starts: Many[int], widths: Many[int]) -> torch.Tensor:
        """See ``SlotCache``. Rows side by side, and of one width."""
        self._called = slice(rows[0], rows[-1] + 1)
        for row, start in zip(rows, starts, strict=True):
            if start == 0:  # nothing has been read yet, by whoever has the row now
                for inputs, matrices in self._states.values():
                    inputs[row].zero_()
                    matrices[row].zero_()
        return super().begin(rows, starts, widths)

    # What transformers' layers call.

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``SlotCache``."""
        return super().update(key_states, value_states, self._places[layer_idx])

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
        """Keep the new matrices, but for rows that stay as they are."""
        matrices = self.get_recurrent_state(layer_idx)
        if not self._kept:
            return matrices.copy_(recurrent_states)
        for row, old, new in zip(count(self._called.start), matrices, recurrent_states):
            if row not in self._kept:
                old.copy_(new)
        return matrices

    def _all(self) -> list[torch.Tensor]:
        return [tensor for pair in self._states.values() for tensor in pair]


def _empty(state: State) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(0, *state.inputs, dtype=state.dtype, device=state.device),
        torch.zeros(0, *state.matrices, dtype=torch.float32, device=state.device),
    )


def _resized(old: torch.Tensor, rows: int) -> torch.Tensor:
    new = old.new_zeros(rows, *old.shape[1:])
    kept = min(rows, len(old))
    new[:kept] = old[:kept]
    return new
