"""Pictures that were asked about before: their part of the KV cache, kept for the next question.

In this chat format the picture comes first, so that everything up to its last token is the same
whatever the question is. The key covers the decoded pixels and everything else that decides what
the model makes of them; one that left out the shape served wrong answers (CVE-2025-46722 in vLLM).
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

_STRIP = 256  # rows of a picture


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a prompt's first ``length`` tokens, for each layer."""

    length: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def bytes(self) -> int:
        """Memory that it holds."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)


def image_key(image: Image, salt: str) -> bytes:
    """A digest of pixels, size and mode, and of ``salt``: the processor's settings."""
    digest = hashlib.sha256(f"{image.mode} {image.size} {salt}\0".encode())
    # In strips: all at once are two more copies of a picture of up to 200 MB.
    for top in range(0, image.height, _STRIP):
        bottom = min(top + _STRIP, image.height)
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.digest()


class PrefixCache:
    """The least recently used are dropped when ``budget`` bytes would be exceeded. Any thread.

    One that a request holds, which waits for a slot, stays and counts: to drop it frees nothing.
    """

    def __init__(self, budget: int):
        self.budget, self.bytes = budget, 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Prefix | None:
        """The prefix of a picture, if it is here; counted as a hit or a miss."""
        with self._lock:
            if (entry := self._entries.get(key)) is None:
                self.misses += 1
                return None
            self._entries.move_to_end(key)
            self.hits += 1
            return entry

    def peek(self, key: bytes) -> Prefix | None:
        """As ``get``, for a second look by the same request: it is not counted again."""
        with self._lock:
            return self._entries.get(key)

    def make_room(self, size: int) -> bool:
        """Whether ``size`` bytes more may be kept; what has to go for them has gone then."""
        with self._lock:
            if size <= self.budget:
                self._drop(self.budget - size)
            return self.bytes + size <= self.budget

    def put(self, key: bytes, prefix: Prefix) -> None:
        """Keep ``prefix``, if there is room for it."""
        with self._lock:
            if key in self._entries:
                self._drop_one(key)
        if self.make_room(prefix.bytes):
            with self._lock:
                if key not in self._entries:
                    self._entries[key] = prefix
                    self.bytes += prefix.bytes

    def clear(self) -> int:
        """Forget all that nobody holds; how many bytes that was."""
        with self._lock:
            before = self.bytes
            self._drop(0)
            return before - self.bytes

    def _drop(self, most: int) -> None:
        """Until no more than so many bytes are left, if that can be."""
        for key in list(self._entries):
            if self.bytes <= most:
                break
            self._drop_one(key)

    def _drop_one(self, key: bytes) -> None:
        prefix = self._entries.pop(key)
        size, held = prefix.bytes, weakref.ref(prefix)
        del prefix  # now it is there only if somebody else holds it
        if (still := held()) is not None:
            self._entries[key] = still
        else:
            self.bytes -= size
