"""What was computed for earlier prompts and answers: the next one that begins alike begins there.

Tokens are compared one by one, and a picture counts by its key, which covers the decoded pixels and
everything else that decides what the model makes of them; one that left out the shape served wrong
answers (CVE-2025-46722 in vLLM). So what is found depends on everything before and in it.

Each owner of requests finds what was computed for them alone: else the time to the first token, and
the count of cached tokens, would tell what others asked (CVE-2025-46570 in vLLM, which leaves it to
a field of each request, ``cache_salt``).

What prompts have in common is kept once: a ``Segment`` goes on where another ends, as in the tree
of SGLang's ``radix_cache.py``, but is never split.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from qwenvl_app.engine.kv_cache import Layers

if TYPE_CHECKING:
    from PIL.Image import Image

Mark = tuple[int, bytes]  # where a picture begins, and its key
Beginning = tuple[str, bytes, Mark | None]  # the owner, first tokens, a picture near them

_STRIP = 256  # rows of a picture
_WORTH = 16  # tokens; fewer are computed sooner than looked for, if there is no picture in them


@dataclass(frozen=True)
class Text:
    """What tokens mean: their ids and, in order, the pictures among them. It is ``owner``'s."""

    ids: np.ndarray[tuple[int], np.dtype[np.int64]]
    pictures: tuple[Mark, ...]
    owner: str = ""

    @classmethod
    def of(cls, ids: Many[int], pictures: Iterable[Mark], owner: str = "") -> Text:
        """Of ``ids``, and of ``pictures`` in order."""
        return cls(np.array(ids, np.int64), tuple(pictures), owner)

    @cached_property
    def beginning(self) -> Beginning:
        """The same for all that have a prefix in common with it that is worth a look."""
        mark = self.pictures[0] if self.pictures else None
        if mark and mark[0] < _WORTH:
            return self.owner, self.ids[: mark[0]].tobytes(), mark
        return self.owner, self.ids[:_WORTH].tobytes(), None

    def first(self, length: int) -> Text:
        """Its first tokens."""
        pictures = tuple(p for p in self.pictures if p[0] < length)
        return Text(self.ids[:length], pictures, self.owner)

    def common(self, other: Text) -> int:
        """How many tokens are the same from the beginning on; never a part of a picture.

        Of an owner's, that is: ``beginning`` keeps owners apart.
        """
        length = min(len(self.ids), len(other.ids))
        differ = self.ids[:length] != other.ids[:length]
        if differ.any():
            length = int(differ.argmax())
        for ours, theirs in zip_longest(self.pictures, other.pictures):
            if ours != theirs:
                return min(length, *(mark[0] for mark in (ours, theirs) if mark))
        return length


@dataclass(frozen=True, eq=False)
class Segment:
    """What the cache has of the tokens from the end of ``parent`` to that of ``text``.

    ``layers``: keys and values (heads, tokens, head_dim) of each; then, of recurrent layers, their
    states at the end. ``text`` begins where the prompt does.
    """

    text: Text
    layers: Layers
    parent: Segment | None = None

    @property
    def start(self) -> int:
        """The first token that is in ``layers``."""
        return self.parent.length if self.parent else 0

    @property
    def length(self) -> int:
        """Tokens up to the end, from the prompt's beginning."""
        return len(self.text.ids)

    @property
    def bytes(self) -> int:
        """Memory that it holds, without ``parent``'s."""
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)

    def chain(self) -> list[Segment]:
        """All from the prompt's beginning up to this one."""
        return [*(self.parent.chain() if self.parent else []), self]


@dataclass(frozen=True)
class Prefix:
    """The first ``length`` tokens of a prompt, which end in ``last``. Who has it holds them."""

    length: int
    last: Segment


def image_key(image: Image, salt: str) -> bytes:
    """A digest of pixels, size and mode, and of ``salt``: how the picture is processed."""
    digest = hashlib.sha256(f"{image.mode} {image.size} {salt}\0".encode())
    # In strips: all at once are two more copies of a picture of up to 200 MB.
    for top in range(0, image.height, _STRIP):
        bottom = min(top + _STRIP, image.height)
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.digest()


class PrefixCache:
    """The least recently used are dropped when ``budget`` bytes would be exceeded. Any thread.

    One that a request holds, which waits for a slot, stays and counts: to drop it frees nothing.
    So does one that others go on from. ``whole``: a segment can't be cut, as recurrent states.
    """

    def __init__(self, budget: int, *, whole: bool = False):
        self.budget, self.bytes = budget, 0
        self.hits = self.misses = 0
        self._whole = whole
        self._segments: list[Segment] = []  # the least recently used first
        # By their beginning: small models keep thousands, and the engine's thread looks too.
        self._alike: dict[Beginning, list[Segment]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._segments)

    def get(self, text: Text) -> Prefix | None:
        """The longest prefix of ``text`` that is here; counted as a hit or a miss.

        At least one token of ``text`` is left to be computed.
        """
        with self._lock:
            found = self._find(text)
            self.hits += found is not None
            self.misses += found is None
            if found:
                self._touch(found.last)
            return found

    def peek(self, text: Text) -> Prefix | None:
        """As ``get``, for a second look by the same request: it is not counted again."""
        with self._lock:
            return self._find(text)

    def base(self, text: Text) -> Segment | None:
        """The longest segment that ``text`` wholly begins with: what is put goes on from there."""
        with self._lock:
            found = self._find(text, whole=True, most=len(text.ids))
        return found.last if found else None

    def make_room(self, size: int) -> bool:
        """Whether ``size`` bytes more may be kept; what has to go for them has gone then."""
        with self._lock:
            if size <= self.budget:
                self._drop(self.budget - size)
            return self.bytes + size <= self.budget

    def put(self, segment: Segment) -> None:
        """Keep ``segment``, if there is room for it."""
        if self.make_room(segment.bytes):
            with self._lock:
                self._segments.append(segment)
                self._alike.setdefault(segment.text.beginning, []).append(segment)
                self.bytes += segment.bytes
                self._touch(segment)

    def clear(self) -> int:
        """Forget all that nobody holds; how many bytes that was."""
        with self._lock:
            before = self.bytes
            self._drop(0)
            return before - self.bytes

    def _find(self, text: Text, *, whole: bool = False, most: int | None = None) -> Prefix | None:
        most = len(text.ids) - 1 if most is None else most
        best: Prefix | None = None
        for segment in self._alike.get(text.beginning, ()):
            length = min(segment.text.common(text), most)
            if length < segment.length if whole or self._whole else length <= segment.start:
                continue
            if best is None or length > best.length:
                best = Prefix(length, segment)
        if best and (best.length >= _WORTH or any(p[0] < best.length for p in text.pictures)):
            return best
        return None

    def _touch(self, segment: Segment) -> None:
        """It was used now. What it goes on from comes after it, and so is dropped after it."""
        for each in reversed(segment.chain()):
            self._segments.remove(each)
            self._segments.append(each)

    def _drop(self, most: int) -> None:
        """Until no more than so many bytes are left, if that can be."""
        place = 0
        while self.bytes > most and place < len(self._segments):
            segment = self._segments.pop(place)
            beginning = segment.text.beginning
            alike = self._alike[beginning]
            alike.remove(segment)
            size, held = segment.bytes, weakref.ref(segment)
            del segment  # now it is there only if somebody else holds it
            if (still := held()) is not None:
                self._segments.insert(place, still)
                alike.append(still)
                place += 1
            else:
                self.bytes -= size
                if not alike:
                    del self._alike[beginning]
