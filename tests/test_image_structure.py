"""Files of too many pieces are refused unread, and real ones are not."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest

from qwenvl_app.images.structure import ExcessiveStructureError, check_structure
from tests import pictures as p
from tests.wire import PNG, picture


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "MPO"]
)
def test_ordinary_files_pass(file_format: str):
    check_structure(picture(file_format=file_format))


def big_endian(*tags: tuple[int, int, int, int]) -> bytes:
    entries = b"".join(
        struct.pack(">HHL", *tag[:3]) + struct.pack(">HH", tag[3], 0) for tag in tags
    )
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: p.jpeg_with(p.segment(0xFE) * 1001),
        # Each piece was joined to all before it: 4 MB took half a minute.
        lambda: p.jpeg_with(p.segment(0xE1, b"Exif\0\0" + bytes(50_000)) * 22),
        lambda: p.jpeg_with(b"\xff" * 70_000),
        lambda: p.jpeg_with(p.segment(0xFE) + bytes(70_000)),
        # Pillow takes no notice of this marker's length, so that what it covers counts.
        lambda: p.jpeg_with(b"\xff\xf0\x7f\xff" + p.segment(0xFE) * 1001),
        lambda: p.progressive(33),
        # Scans that stand behind many tables were not counted.
        lambda: p.progressive(33, p.segment(0xFE) * 600),
        lambda: p.png_with(p.chunk(b"tEXt", b"a\0b") * 257),
        lambda: p.png_with(p.zipped(lambda text: p.chunk(b"zTXt", b"k\0\0" + text), 100 * p.MB)),
        lambda: p.png_with(
            p.zipped(lambda text: p.chunk(b"iTXt", b"k\0\1\0en\0k\0" + text), 100 * p.MB)
        ),
        lambda: (
            PNG[:-12]
            + p.zipped(lambda text: p.chunk(b"iCCP", b"k\0\0" + text), 100 * p.MB)
            + PNG[-12:]
        ),
        lambda: p.png_with(p.chunk(b"IDAT") * 20_001),
        lambda: p.gif_with(b"!\xfe\0" * 20_001),
        lambda: p.gif_with(b"!\xfe" + b"\1a" * 20_001 + b"\0"),
        lambda: p.gif_with(bytes([1]) * 20_001),
        lambda: p.tiff((282, 5, 500_001, b"1234")),
        lambda: p.tiff(*((1000 + i, 3, 1, b"\1\0") for i in range(4100))),
        lambda: p.tiff((322, 4, 1, struct.pack("<L", 4097)), (323, 3, 1, struct.pack("<H", 4097))),
        lambda: big_endian((322, 3, 1, 4097), (323, 3, 1, 4097)),
        lambda: (
            p.tiff((34665, 4, 1, struct.pack("<L", 200))).ljust(200, b"\0")
            + p.directory((1, 5, 500_001, b"1234"))
        ),
    ],
    ids=[
        "segments",
        "EXIF",
        "fill bytes",
        "junk",
        "a marker without a length",
        "scans",
        "scans behind comments",
        "PNG metadata",
        "PNG text",
        "PNG international text",
        "PNG profile",
        "PNG chunks",
        "GIF blocks",
        "GIF sub-blocks",
        "GIF junk",
        "TIFF numbers",
        "TIFF tags",
        "TIFF tile",
        "TIFF tile in short big-endian numbers",
        "TIFF EXIF numbers",
    ],
)
def test_too_many_pieces(make: Callable[[], bytes]):
    data = make()
    with pytest.raises(ExcessiveStructureError):
        check_structure(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: p.jpeg_with(p.segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 10),
        lambda: p.jpeg_with(p.segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000)) * 300),
        lambda: p.progressive(32),
        # Behind the end of the picture may be a film, as in a phone's moving photo.
        lambda: p.progressive(10) + b"\xff\xda" * 1000,
        lambda: p.png_with(p.chunk(b"tEXt", b"a\0b") * 250),
        lambda: p.png_with(*(p.packed_text(kind, 3 * p.MB) for kind in ("zTXt", "iTXt", "iCCP"))),
        lambda: p.png_with(p.zipped(lambda text: p.chunk(b"zTXt", b"k\0\0" + text), 10 * p.MB)),
        lambda: PNG + p.chunk(b"tEXt") * 1000,
        lambda: p.animation("PNG", 2000),
        lambda: p.gif_with(b"!\xfe" + (b"\xff" + bytes(255)) * 19_000 + b"\0"),
        lambda: p.tiff((322, 4, 1, struct.pack("<L", 1024)), (323, 4, 1, struct.pack("<L", 1024))),
        # A directory that names itself as its own EXIF.
        lambda: p.tiff((34665, 4, 1, struct.pack("<L", 8))),
    ],
    ids=[
        "large EXIF",
        "large profile",
        "many scans",
        "a film",
        "PNG metadata",
        "large PNG texts",
        "a PNG's text that packs well",
        "behind a PNG",
        "APNG",
        "a long GIF comment",
        "tiles",
        "a loop",
    ],
)
def test_unusual_but_real_files_pass(make: Callable[[], bytes]):
    check_structure(make())


def test_any_bytes_are_survived():
    """What is broken raises what a decoder may raise, or nothing."""
    for data in (PNG, p.JPEG, p.GIF, p.tiff(), picture(file_format="TIFF")):
        for end in range(len(data)):
            with suppress(ExcessiveStructureError, struct.error, IndexError):
                check_structure(data[:end])
