"""The KV cache: one slot a sequence, behind transformers' ``Cache`` interface.

The stock attention code hands over the new keys and values and gets back what to attend to. Here
each row of a call is written to its slot at its own position, so rows of different lengths share
one call; which columns a row may look at is said by the 4-D mask that ``begin`` returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache

from qwenvl_app.engine.layout import Layout

Box = tuple[slice, slice, slice]  # slots, heads, tokens
Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each

BLOCK = 128  # tokens; slots grow by so many at a time
FEWEST_SLOTS = 2  # of a roomy cache: torch.compile would make a special case of one
FLOOR = 4 * BLOCK  # tokens in all slots that are not worth giving back
UNBOUNDED = 2**62


def power_of_two(number: int, least: int = 1) -> int:
    """The least one that is no smaller."""
    return max(least, 1 << (number - 1).bit_length())


def resized(old: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of ``shape``, with what ``old`` has there; zeros elsewhere."""
    new = old.new_zeros(shape)
    kept = tuple(slice(min(sizes)) for sizes in zip(shape, old.shape, strict=True))
    new[kept] = old[kept]
    return new


class SlotCache(Cache):
    """Keys and values of all slots: for each layer two tensors (slots, heads, length, head_dim).

    Memory follows the tokens that live: the rectangle grows in blocks and shrinks when it is much
    too large, or larger than it may be. While it does either, one tensor of one layer is there
    twice, which is no part of a budget in tokens (``Footprint.token`` counts it). Used by
    the engine's thread alone.

    ``roomy``, in tokens: the rectangle's sides are powers of two (slots, blocks) as long as it is
    no larger than that, and it is kept while it is no larger than a quarter of it. ``version``
    changes with the tensors' addresses. Both are for ``CompiledDecode``.
    """

    def __init__(self, layout: Layout, roomy: int = 0):
        super().__init__(layers=[])
        self.layout = layout
        self._roomy, self._floor = roomy, max(FLOOR, roomy // 4)
        self.version = -1
        self._places = {layer: place for place, layer in enumerate(layout.attending)}
        self.reset()
        # Of the call that is under way:
        self._slots: list[int] = []
        self._starts: list[int] = []
        self._widths: list[int] = []
        self._indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._length = 0
        self._block: Box | None = None  # of a tensor: where all that is new goes, if it is one box
        self._live: Box | None = None  # what is attended to, if it is one

    @property
    def bytes(self) -> int:
        """Memory that is held."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def fit(self, slots: int, length: int, most: int = UNBOUNDED) -> None:
        """Make room for so many slots of so many tokens; give room back that is far too much.

        What lies outside of that is lost: ``slots`` and ``length`` are of all that live. ``most``:
        the tokens that there may be in all, those included that nobody needs, or not yet.
        """
        # Of the tensor that is changed last: where memory ran out, the same call goes on.
        slots_now, _, length_now, _ = self._values[-1].shape
        held = slots_now * length_now
        too_small = slots > slots_now or length > length_now
        slots, length = self._sides(slots, length, most)
        far_too_much = held > self._floor and 4 * slots * length <= held
        if too_small or far_too_much or held > most:
            # Both sides anew: what one of them once was may be over the budget beside the other.
            self._resize(slots, length)

    def hold(self, slots: int, length: int) -> int:
        """Make room that is kept when nobody needs it; returns its tokens a slot, at most so many.

        0 if the budget is too small for that.
        """
        slots = power_of_two(slots, FEWEST_SLOTS)
        while slots * length > self._floor:
            length //= 2
        if length < BLOCK:
            return 0
        self.fit(slots, length)
        return length

    @property
    def slots(self) -> int:
        """Those that there is memory for."""
        return self._keys[0].shape[0]

    @property
    def length(self) -> int:
        """Tokens of a slot that there is memory for."""
        return self._keys[0].shape[2]

    def first(self, slots: int, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of each layer, the first ``length`` keys and values of the first ``slots``."""
        box = slice(slots), slice(None), slice(length)
        return [keys[box] for keys in self._keys], [values[box] for values in self._values]

    def reset(self) -> None:
        """Forget all slots, also after something failed in the middle of a change."""
        self.version += 1
        layout = self.layout
        empty = (0, layout.heads, 0, layout.head_dim)
        self._keys = [torch.zeros(empty, dtype=layout.dtype, device=d) for d in layout.devices]
        self._values = [torch.zeros_like(keys) for keys in self._keys]

    def move(self, source: int, target: int) -> None:
        """Copy a slot to one that is no longer used; one without memory has nothing."""
        for tensor in self._tensors():
            if source < len(tensor):
                tensor[target].copy_(tensor[source])

    def clear(self, slot: int) -> None:
        """Zero a slot, whose numbers are not finite: a weight of 0 times NaN is NaN."""
        for tensor in self._tensors():
            tensor[slot].zero_()

    def save(self, slot: int, length: int, start: int = 0) -> Layers:
        """A copy of a slot from ``start`` to ``length``, each tensor (heads, tokens, head_dim)."""
        return [
            (keys[slot, :, start:length].clone(), values[slot, :, start:length].clone())
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def restore(self, slot: int, saved: Layers, start: int = 0, length: int = UNBOUNDED) -> None:
        """Put what ``save`` returned into a slot from ``start`` on, up to ``length``."""
        for keys, values, (old_keys, old_values) in zip(
            self._keys, self._values, saved, strict=True
        ):
            stop = min(start + old_keys.shape[1], length)
            keys[slot, :, start:stop] = old_keys[:, : stop - start]
            values[slot, :, start:stop] = old_values[:, : stop - start]

    @contextmanager
    def kept(self, slots: list[int]) -> Iterator[None]:
        """Within the block, a call of the model leaves nothing behind in ``slots``.

        Of keys and values it does not anyway: those lie after the slot's end, and are overwritten.
        """
        yield

    def begin(self, slots: Many[int], starts: Many[int], widths: Many[int]) -> torch.Tensor:
        """Prepare a call of the model: ``widths[i]`` tokens for ``slots[i]`` from ``starts[i]`` on.

        Returns the mask, bool (rows, 1, widest, columns), True where a token may look. The call's
        inputs are padded on the right to the widest row. There must be room, see ``fit``.
        """
        self._slots, self._starts, self._widths = list(slots), list(starts), list(widths)
        self._indices.clear()
        widest = max(widths)
        self._length = max(
            start + width for start, width in zip(self._starts, self._widths, strict=True)
        )
        first, count, start = self._slots[0], len(slots), self._starts[0]
        self._block = self._live = None
        if self._slots == list(range(first, first + count)):
            here, every = slice(first, first + count), slice(None)
            self._live = here, every, slice(self._length)
            if self._starts == [start] * count:
                self._block = here, every, slice(start, start + widest)
        device = self.layout.devices[0]
        last = torch.tensor(self._starts, device=device)[:, None]
        if widest > 1:
            last = last + torch.arange(widest, device=device)
        columns = torch.arange(self._length, device=device)
        return (columns <= last[..., None])[:, None]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values (rows, heads, widest, head_dim); returns all to attend to."""
        place = self._places[layer_idx]
        keys, values = self._keys[place], self._values[place]
        if self._block:
            # What pads a row comes too: after its end, where it is not looked at.
            keys[self._block], values[self._block] = key_states, value_states
        elif key_states.shape[2] == 1:
            slots, places = self._index(keys.device)
            keys[slots, :, places] = key_states[:, :, 0]
            values[slots, :, places] = value_states[:, :, 0]
        else:
            for number, (slot, start, width) in enumerate(
                zip(self._slots, self._starts, self._widths, strict=True)
            ):
                keys[slot, :, start : start + width] = key_states[number, :, :width]
                values[slot, :, start : start + width] = value_states[number, :, :width]
        if not any(self._starts):  # nothing came before
            return key_states, value_states
        if self._live:
            return keys[self._live], values[self._live]
        slots, _ = self._index(keys.device)
        return keys[slots, :, : self._length], values[slots, :, : self._length]

    def _tensors(self) -> list[torch.Tensor]:
        return [*self._keys, *self._values]

    def _index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._indices:
            self._indices[device] = (
                torch.tensor(self._slots, device=device),
                torch.tensor(self._starts, device=device),
            )
        return self._indices[device]

    def _sides(self, slots: int, length: int, most: int) -> tuple[int, int]:
        """Slots and tokens of the rectangle for so many slots of so many tokens."""
        if not slots or not length:
            return slots, 0
        blocks = -(-length // BLOCK)
        more_slots, more_blocks = power_of_two(slots, FEWEST_SLOTS), power_of_two(blocks)
        if more_slots * more_blocks * BLOCK <= min(self._roomy, most):
            return more_slots, more_blocks * BLOCK
        return slots, max(length, min(blocks * BLOCK, most // slots))

    def _resize(self, slots: int, length: int) -> None:
        self.version += 1
        # Layer by layer, so that at most one of them is there twice.
        for tensors in (self._keys, self._values):
            for number, old in enumerate(tensors):
                if old.shape[0] == slots and old.shape[2] == length:
                    continue
                tensors[number] = resized(old, (slots, old.shape[1], length, old.shape[3]))
