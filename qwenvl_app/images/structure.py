"""How many pieces a picture's file is made of, counted before a decoder is let at it.

Pillow reads a file's metadata in Python, piece by piece, and keeps all of it; libjpeg goes over the
whole picture once for every scan. So a small file can cost minutes, or gigabytes, before a pixel is
seen: 200,000 EXIF segments, 15,000 colour profiles of a megabyte each, 200,000 scans of 50 bytes.
The limits here are ten times what real files have. Nothing is unpacked or copied.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from itertools import islice

from PIL.JpegImagePlugin import MARKER

_MAX_SEGMENTS = 1000  # of a JPEG before its pixels; a colour profile of 20 MB has 320
_MAX_EXIF = 2**20  # bytes of EXIF in a JPEG; Pillow unpacks its numbers, 60 bytes for each of 8
_MAX_SCANS = 32  # of a JPEG; the usual progressive one has 10
_MAX_JUNK = 2**16  # bytes between two segments, which Pillow skips one at a time
_MAX_CHUNKS = 20_000  # of a PNG; 20 MB in libpng's IDAT chunks of 8 KiB are 2,500
_MAX_METADATA = 256  # PNG chunks that hold neither pixels nor frames; each may unpack to 1 MB
_MAX_BLOCKS = 20_000  # of a GIF before its first frame; each holds up to 255 bytes
_MAX_TAGS = 4096  # of a TIFF directory
_MAX_NUMBERS = 500_000  # in a TIFF's tags: strips of one row of a picture of 100,000 rows
_MAX_TILE = 2**24  # pixels of one tile of a TIFF, which libtiff takes memory for as it is told

_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
_JPEG_AFTER_SCAN = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
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


def _jpeg(data: bytes) -> None:
    position = 2
    exif = 0
    frame = 0
    for _ in range(_MAX_SEGMENTS):
        match = _JPEG_MARKER.search(data, position, position + _MAX_JUNK)
        if match is None:
            break
        marker = match[1][0]
        position = match.end()
        # Pillow's own table says which markers have a length; it skips nothing behind the others.
        if MARKER.get(0xFF00 | marker, ("", "", None))[2] is None:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if marker == 0xE1 and data.startswith(b"Exif\0\0", position + 2):
            exif += length
        elif marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
            frame = marker
        position += length
        if exif > _MAX_EXIF:
            break
        if marker == 0xDA:
            # A scan of a baseline picture has bits for every block, so that many take many bytes.
            if frame not in (0xC0, 0xC1):
                _jpeg_scans(data, position)
            return
    raise ExcessiveStructureError


def _jpeg_scans(data: bytes, position: int) -> None:
    markers = (match[1] for match in _JPEG_AFTER_SCAN.finditer(data, position))
    scans = 1
    # Between scans there are tables, up to eight; behind the end may be anything.
    for marker in islice(markers, 16 * _MAX_SCANS):
        if marker == b"\xd9":
            return
        scans += marker == b"\xda"
        if scans > _MAX_SCANS:
            break
    else:
        return
    raise ExcessiveStructureError


def _png(data: bytes) -> None:
    position = 8
    metadata = 0
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        metadata += kind not in _PNG_PIXELS
        if kind == b"IEND":
            return
        if metadata > _MAX_METADATA:
            break
        position += 12 + length
    raise ExcessiveStructureError


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


def _tiff(data: bytes) -> None:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43
    head = struct.Struct(order + ("Q" if big else "H"))
    entry = struct.Struct(order + ("HHQQ" if big else "HHLL"))
    directories = list(struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4))
    numbers, tile = 0, 1
    # The picture's own, EXIF, GPS, interoperability: Pillow reads no more, and each of them once.
    for _ in range(4):
        if not directories or directories[-1] + head.size > len(data):
            break
        offset = directories.pop()
        (tags,) = head.unpack_from(data, offset)
        if tags > _MAX_TAGS:
            raise ExcessiveStructureError
        offset += head.size
        end = min(offset + tags * entry.size, len(data) - entry.size + 1)
        for position in range(offset, end, entry.size):
            tag, kind, count, value = entry.unpack_from(data, position)
            numbers += 0 if kind in _TIFF_BYTES else count
            if kind == 3 and order == ">":  # a short one stands in the upper bytes
                value >>= 48 if big else 16
            if tag in _TIFF_TILE:
                tile *= value
            elif tag in _TIFF_DIRECTORIES:
                directories.append(value)
    if numbers > _MAX_NUMBERS or tile > _MAX_TILE:
        raise ExcessiveStructureError


_CHECKS: dict[bytes, Callable[[bytes], None]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"GIF8": _gif,
    b"II": _tiff,
    b"MM": _tiff,
}
