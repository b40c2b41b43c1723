"""Chooses which bytes of a picture's file its decoder sees.

Decoders refuse files for what no viewer looks at, and misread some fields that say little. Both are
kept from them here, by showing another file: the same bytes in pieces, with some left out, and a
few put in their place. Files can have 20 MB, so none is copied.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from qwenvl_app.images.pieces import Pieces
from qwenvl_app.images.structure import JPEG_AFTER_SCAN, TiffFile, jpeg_segments, png_chunks

_PNG_CHECKED = (b"tRNS", b"eXIf", b"fcTL")  # of the chunks that a decoder may do without
_JPEG_END = b"\xff\xd9"
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # of Huffman codes; arithmetic ones may end in bits left out
_JPEG_MARKERS = 512  # that are looked at
_JPEG_NOISE = bytes(range(254, 0, -1))  # no marker in it
_TIFF_SAMPLES, _TIFF_PHOTOMETRIC, _TIFF_PLANAR = 277, 262, 284


class Source(NamedTuple):
    """A file to decode."""

    pieces: Pieces
    # The same with another end: a picture that depends on it is cut off.
    other_end: Pieces | None = None
    # A TIFF that says that 0 is white, shown as one that says it is black.
    inverted: bool = False


def source(data: bytes) -> Source:
    """The pieces of ``data`` that are a picture, or all of it.

    ``check_structure`` has passed ``data``. A damaged file may raise struct.error, LookupError or
    ValueError, or come as it is: that is the decoder's to find.
    """
    for magic, show in _SHOWN.items():
        if data.startswith(magic):
            return show(data)
    return Source((data,))


def _replaced(data: bytes, places: dict[int, bytes]) -> Pieces:
    """``data`` with other bytes in some places."""
    pieces: list[bytes | memoryview] = []
    view, position = memoryview(data), 0
    for place in sorted(places):
        pieces += [view[position:place], places[place]]
        position = place + len(places[place])
    return (*pieces, view[position:]) if pieces else (data,)


def _png(data: bytes) -> Source:
    """The chunks that make the picture, none of texts, profiles, times and further frames.

    A damaged one that a decoder may do without is left out too, as libpng does. Of an animation the
    picture that stands for it is shown, which is its first frame unless that is stored apart; one
    whose first frame is not the first in order is refused.
    """
    runs: list[list[int]] = [[0, 8]]
    pixels = False
    for kind, start, end in png_chunks(data):
        if pixels and end - start == 8:  # a header at the file's end, and no more
            break
        pixels |= kind == b"IDAT"
        if kind.isalpha() and kind[0] & 32:
            if kind not in _PNG_CHECKED or not _whole(data, start, end):
                continue
            if kind == b"fcTL":
                if not pixels and any(data[start + 8 : start + 12]):
                    raise ValueError("frames are not in order")
                continue
        if runs[-1][1] == start:
            runs[-1][1] = end
        else:
            runs.append([start, end])
    if runs == [[0, len(data)]]:
        return Source((data,))
    view = memoryview(data)
    return Source(tuple(view[start:end] for start, end in runs))


def _whole(data: bytes, start: int, end: int) -> bool:
    """Whether a chunk's checksum is right."""
    return zlib.crc32(memoryview(data)[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])


def _jpeg(data: bytes) -> Source:
    """With an end, where only that is missing.

    libjpeg makes a picture of half a file too, and says nothing. But where all of it is there the
    picture can't depend on what follows: so it is decoded with two ends, of which one has bits and
    restart markers for what might be missing. That every scan is there is seen by their headers.
    """
    segments = list(jpeg_segments(data))
    first = segments[-1][1]
    if data.rfind(_JPEG_END, first) >= 0:
        return Source((data,))
    frame = next((at for marker, at in segments if marker in _JPEG_FRAMES), None)
    last = None if frame is None else _last_scan(data, frame, first)
    if last is None:
        return Source((data,))
    # A scan ends in few zeros. Many are what a download leaves that was broken off.
    filler = b"\0\xff" if data.endswith(bytes(16)) else b"\xff"
    shown = memoryview(data)[: len(data.rstrip(filler))]
    found = {data.rfind(bytes([0xFF, 0xD0 + number]), last): number for number in range(8)}
    following = found[max(found)] + 1 if max(found) >= 0 else 0
    restarts = (bytes([0xFF, 0xD0 + (following + number) % 8]) for number in range(8))
    rest = _JPEG_NOISE + b"".join(restart + _JPEG_NOISE for restart in restarts)
    return Source((shown, _JPEG_END), (shown, rest + _JPEG_END))


def _last_scan(data: bytes, frame: int, scan: int) -> int | None:
    """Where the last scan's header stands, if the scans send all bits of all coefficients.

    ``frame`` and ``scan`` are where the lengths of SOF and of the first SOS stand (ITU T.81, B.2).
    """
    components = data[frame + 8 : frame + 8 + 3 * data[frame + 7] : 3]
    sent: dict[int, set[int]] = {component: set() for component in components}
    for _ in range(_JPEG_MARKERS):
        (length,) = struct.unpack_from(">H", data, scan)
        names = data[scan + 3 : scan + 3 + 2 * data[scan + 2] : 2]
        start, end, bits = data[scan + length - 3 : scan + length]
        if bits & 15 == 0:
            for name in names:
                sent[name].update(range(start, min(end, 63) + 1))
        following = _next_scan(data, scan + length)
        if following is None:
            return scan if all(len(each) == 64 for each in sent.values()) else None
        scan = following
    return None


def _next_scan(data: bytes, position: int) -> int | None:
    for _ in range(_JPEG_MARKERS):
        match = JPEG_AFTER_SCAN.search(data, position)
        if match is None:
            return None
        position = match.end()
        if match[1] == b"\xda":
            return position
        (length,) = struct.unpack_from(">H", data, position)
        position += length
    raise ValueError("too many tables")


def _webp(data: bytes) -> Source:
    """An animation, as one with transparency: where its first frame does not reach is nothing.

    RFC 9649, 2.7: the flags follow the header of the chunk VP8X.
    """
    animated, alpha = 2, 16
    if data[8:16] != b"WEBPVP8X" or not data[20] & animated or data[20] & alpha:
        return Source((data,))
    return Source(_replaced(data, {20: bytes([data[20] | alpha])}))


def _bmp(data: bytes) -> Source:
    """Without the number of its colours, where there are fewer than fit.

    Pillow takes black and white for a picture of one bit a pixel and greys from 0 on for one of 8,
    whatever it has. Without the number it reads what follows as more colours, and does neither.
    """
    start, header = struct.unpack_from("<LL", data, 10)
    if header < 40:
        return Source((data,))
    bits, used = struct.unpack_from("<H16xL", data, 28)
    fewer = used == 2 if bits == 8 else bits == 4 and 0 < used < 16
    if not fewer or start == 14 + header:
        return Source((data,))
    greys = (0, 255) if used == 2 else range(used)
    colors = data[14 + header : 14 + header + 4 * used]
    misread = all(colors[4 * i : 4 * i + 3] == bytes([grey] * 3) for i, grey in enumerate(greys))
    return Source(_replaced(data, {46: bytes(4)}) if misread else (data,))


def _tiff(data: bytes) -> Source:
    """With 0 as black, and in one plane where there is one sample.

    Pillow turns round only some of the pictures whose 0 is white, and takes the plane of a single
    sample for one of many, with the wrong number of bits.
    """
    file = TiffFile(data)
    one = struct.pack(file.order + "H", 1)
    entries = {entry.tag: entry for entry in file.entries(file.first)}
    places = {}
    photometric = entries.get(_TIFF_PHOTOMETRIC)
    inverted = photometric is not None and photometric[1:4] == (3, 1, 0)
    if photometric and inverted:
        places[photometric.at] = one
    planar, samples = entries.get(_TIFF_PLANAR), entries.get(_TIFF_SAMPLES)
    if planar and planar[1:4] == (3, 1, 2) and (samples is None or samples.value == 1):
        places[planar.at] = one
    return Source(_replaced(data, places), inverted=inverted)


_SHOWN: dict[bytes, Callable[[bytes], Source]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"BM": _bmp,
    b"II": _tiff,
    b"MM": _tiff,
}
