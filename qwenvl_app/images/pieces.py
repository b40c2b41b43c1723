"""A file in pieces, read as one without copying them together."""

from __future__ import annotations

import io
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Pieces = tuple[bytes | memoryview, ...]


def opened(pieces: Pieces) -> BinaryIO:
    """``pieces`` as one file to be read."""
    if len(pieces) == 1 and isinstance(pieces[0], bytes):
        return io.BytesIO(pieces[0])  # which shares them
    return io.BufferedReader(_Joined(pieces), 2**16)


class _Joined(io.RawIOBase):
    def __init__(self, pieces: Pieces):
        self._pieces = [memoryview(piece) for piece in pieces]
        self._ends = list(accumulate(len(piece) for piece in self._pieces))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        number = bisect_right(self._ends, self._position)
        if number == len(self._ends):
            return 0
        into = memoryview(buffer)
        rest = self._pieces[number][self._position - self._ends[number] :]
        count = min(len(into), len(rest))
        into[:count] = rest[:count]
        self._position += count
        return count
