"""How many pieces a picture's file is made of, counted before a decoder is let at it.

Pillow reads a file's metadata in Python, piece by piece, and keeps all of it; libjpeg goes over the
whole picture once for every scan. So a small file can cost minutes, or gigabytes, before a pixel is
seen: 200,000 EXIF segments, 15,000 colour profiles of a megabyte each, 200,000 scans of 50 bytes.
The limits here are ten times what real files have. Nothing is unpacked or copied but the beginning
of a PNG's packed texts.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from PIL.JpegImagePlugin import MARKER

_MAX_SEGMENTS = 1000  # of a JPEG before its pixels; a colour profile of 20 MB has 320
_MAX_EXIF = 2**20  # bytes of EXIF in a JPEG; Pillow unpacks its numbers, 60 bytes for each of 8
_MAX_SCANS = 32  # of a JPEG; the usual progressive one has 10
_MAX_JUNK = 2**16  # bytes between two segments, which Pillow skips one at a time
_MAX_CHUNKS = 20_000  # of a PNG; 20 MB in libpng's IDAT chunks of 8 KiB are 2,500
_MAX_METADATA = 256  # PNG chunks that hold neither pixels nor frames; real files have up to 25
_MAX_UNPACKED = 2**25  # bytes of a PNG's packed texts and profiles; an upload itself has fewer
_MAX_BLOCKS = 20_000  # of a GIF before its first frame; each holds up to 255 bytes
_MAX_TAGS = 4096  # of a TIFF directory
_MAX_NUMBERS = 500_000  # in a TIFF's tags: strips of one row of a picture of 100,000 rows
_MAX_TILE = 2**24  # pixels of one tile of a TIFF, which libtiff takes memory for as it is told

_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
JPEG_AFTER_SCAN = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_PNG_PIXELS = (b"IDAT", b"fdAT", b"fcTL")
_TIFF_BYTES = (1, 2, 7)  # kinds that Pillow keeps as they are
_TIFF_DIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS and interoperability
_TIFF_TILE = (322, 323)  # width and height


class ExcessiveStructureError(Exception):
    """The file is made of more pieces than any real one. For the caller alone, never a client."""


def check_structure(data: bytes) -> None:
    """Raise ExcessiveStructureError for a file that costs more to take apart than it is worth.

    A damaged one may raise struct.error or IndexError, or pass: that is the decoder's to find.
    """
    for magic, check in _CHECKS.items():
        if data.startswith(magic):
            check(data)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Each marker of a JPEG that has a length, and where that stands, up to the first scan's.

    Raises ExcessiveStructureError where no scan comes in time, and struct.error at the file's end.
    """
    position = 2
    for _ in range(_MAX_SEGMENTS):
        match = _JPEG_MARKER.search(data, position, position + _MAX_JUNK)
        if match is None:
            break
        marker = match[1][0]
        position = match.end()
        # Pillow's own table says which markers have a length; it skips nothing after the others.
        if MARKER.get(0xFF00 | marker, ("", "", None))[2] is None:
            continue
        yield marker, position
        if marker == 0xDA:
            return
        (length,) = struct.unpack_from(">H", data, position)
        position += length
    raise ExcessiveStructureError


def _jpeg(data: bytes) -> None:
    exif = 0
    frame = 0
    for marker, position in jpeg_segments(data):
        (length,) = struct.unpack_from(">H", data, position)
        if marker == 0xE1 and data.startswith(b"Exif\0\0", position + 2):
            exif += length
            if exif > _MAX_EXIF:
                raise ExcessiveStructureError
        elif marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
            frame = marker
    # A scan of a baseline picture has bits for every block, so that many take many bytes.
    if frame not in (0xC0, 0xC1):
        _jpeg_scans(data, position + length)


def _jpeg_scans(data: bytes, position: int) -> None:
    scans = 1
    # Between scans there are tables, up to eight; after the end may be anything.
    for number, match in enumerate(JPEG_AFTER_SCAN.finditer(data, position)):
        if match[1] == b"\xd9":
            return
        scans += match[1] == b"\xda"
        if scans > _MAX_SCANS or number > 16 * _MAX_SCANS:
            raise ExcessiveStructureError


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's name, where its length stands and where it ends, up to IEND or the file's end.

    Raises ExcessiveStructureError where there are too many.
    """
    position = 8
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        end = min(position + 12 + length, len(data))
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end
    raise ExcessiveStructureError


def _png(data: bytes) -> None:
    others = (chunk for chunk in png_chunks(data) if chunk[0] not in _PNG_PIXELS)
    chunks = list(islice(others, _MAX_METADATA + 2))
    if len(chunks) > _MAX_METADATA + 1:  # IEND
        raise ExcessiveStructureError
    unpacked = 0
    for kind, start, end in chunks:
        if kind in (b"iCCP", b"zTXt", b"iTXt"):
            unpacked += _unpacked(data, kind, start + 8, end - 4)
        if unpacked > _MAX_UNPACKED:
            raise ExcessiveStructureError


def _unpacked(data: bytes, kind: bytes, start: int, end: int) -> int:
    """How many bytes a text or a profile unpacks to, by its beginning.

    An estimate will do, and costs less than a millisecond: nobody here unpacks the rest.
    """
    start = data.find(b"\0", start, end) + 1  # after the key
    if kind == b"iTXt":
        if data[start] != 1:  # plain
            return 0
        start = data.find(b"\0", start + 2, end) + 1  # the language
        start = data.find(b"\0", start, end)  # the translated key
    sample = data[start + 1 : min(end, start + 2**16)]
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(sample, 2**16))
    except zlib.error:
        return 0
    read = len(sample) - len(unpacker.unconsumed_tail)
    return size if unpacker.eof else size * (end - start) // max(1, read)


def _gif(data: bytes) -> None:
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    for _ in range(_MAX_BLOCKS):
        kind = data[position : position + 1]
        if kind in (b",", b";", b""):  # a frame, or the end
            return
        position += 1
        if kind == b"!":
            position += 1
            for _ in range(_MAX_BLOCKS):
                size = data[position]
                position += 1 + size
                if not size:
                    break
            else:
                break
    raise ExcessiveStructureError


class TiffEntry(NamedTuple):
    """An entry of a TIFF's directory."""

    tag: int
    kind: int
    length: int  # in values
    value: int  # the first of them, or where they stand
    at: int  # where the value stands


class TiffFile:
    """The byte order of a TIFF, and its directories."""

    def __init__(self, data: bytes):
        self.order = "<" if data[:2] == b"II" else ">"
        big = data[2] == 43
        self._data = data
        self._head = struct.Struct(self.order + ("Q" if big else "H"))
        self._entry = struct.Struct(self.order + ("HHQQ" if big else "HHLL"))
        self._upper = 48 if big else 16  # bits above a short in big-endian order
        layout = self.order + ("Q" if big else "L")
        (self.first,) = struct.unpack_from(layout, data, 8 if big else 4)

    def entries(self, offset: int) -> Iterator[TiffEntry]:
        """Those of the directory at ``offset``, of which there may be none."""
        if offset + self._head.size > len(self._data):
            return
        (tags,) = self._head.unpack_from(self._data, offset)
        if tags > _MAX_TAGS:
            raise ExcessiveStructureError
        offset += self._head.size
        size = self._entry.size
        for start in range(offset, min(offset + tags * size, len(self._data) - size + 1), size):
            tag, kind, length, value = self._entry.unpack_from(self._data, start)
            if kind == 3 and self.order == ">":  # a short one stands in the upper bytes
                value >>= self._upper
            at = start + (12 if size == 20 else 8)
            yield TiffEntry(tag, kind, length, value, at)


def _tiff(data: bytes) -> None:
    file = TiffFile(data)
    directories = [file.first]
    numbers, tile = 0, 1
    # The picture's own, EXIF, GPS, interoperability: Pillow reads no more, and each of them once.
    for _ in range(4):
        if not directories:
            break
        for entry in file.entries(directories.pop()):
            numbers += 0 if entry.kind in _TIFF_BYTES else entry.length
            if entry.tag in _TIFF_TILE:
                tile *= entry.value
            elif entry.tag in _TIFF_DIRECTORIES:
                directories.append(entry.value)
    if numbers > _MAX_NUMBERS or tile > _MAX_TILE:
        raise ExcessiveStructureError


_CHECKS: dict[bytes, Callable[[bytes], None]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"GIF8": _gif,
    b"II": _tiff,
    b"MM": _tiff,
}
