"""What of a file its decoder is shown: less than all of it, and never a copy."""

from __future__ import annotations

import io
import random
import struct
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from qwenvl_app.images.pieces import opened
from qwenvl_app.images.source import Source, source
from qwenvl_app.images.structure import ExcessiveStructureError
from tests import pictures as p
from tests.picture_writers import bmp, ramp, tiff
from tests.wire import PNG, encode, picture


def shown(data: bytes) -> bytes:
    return opened(source(data).pieces).read()


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "MPO"]
)
def test_ordinary_files_are_shown_as_they_are(file_format: str):
    data = picture(file_format=file_format)
    assert source(data) == Source((data,))
    assert source(data).pieces[0] is data


def test_pieces_are_one_file():
    """Whatever is asked of it is as it would be of the joined bytes."""
    rng = random.Random(1)
    whole = rng.randbytes(200_000)
    cuts = sorted(rng.choices(range(len(whole)), k=20))
    pieces = tuple(
        memoryview(whole)[start:end]
        for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)
    )
    file, joined = opened(pieces), io.BytesIO(whole)
    for _ in range(300):
        place = rng.randrange(len(whole) + 10)
        assert file.seek(place) == joined.seek(place)
        size = rng.choice((0, 1, 8, 500, 70_000))
        assert file.read(size) == joined.read(size)
        assert file.tell() == joined.tell()
    assert file.seek(-9, io.SEEK_END) == joined.seek(-9, io.SEEK_END)
    assert file.read() == joined.read()
    assert (file.read(1), file.seek(0), file.read()) == (b"", 0, whole)
    with pytest.raises(ValueError, match="before"):
        file.seek(-1 - len(whole), io.SEEK_END)


def test_a_png_is_its_pixels_and_what_they_need():
    kept = p.chunk(b"eXIf", b"exif")
    texts = p.chunk(b"tEXt", b"a\0b") + p.chunk(b"iCCP", b"x\0\0y")
    behind = PNG[:-12] + texts + kept + PNG[-12:] + b"behind the end"
    assert shown(behind) == PNG[:-12] + kept + PNG[-12:]
    assert shown(p.png_with(texts, kept, texts)) == p.png_with(kept)
    frames = p.animation("PNG")
    assert b"fcTL" not in shown(frames)
    assert b"fdAT" not in shown(frames)


def test_nothing_is_copied():
    """20 MB of a file are not 40 while it is decoded."""
    for data in (
        p.png_with(p.packed_text("tEXt", 100)),
        picture(file_format="JPEG")[:-2],
        tiff(ramp(8, 8, 1, 16), 16, 0),
    ):
        pieces = source(data).pieces
        assert len(pieces) > 1
        for piece in pieces:
            assert len(memoryview(piece)) <= 2 or memoryview(piece).obj is data


def test_a_tiff_is_the_same_but_for_its_zero():
    for order, big in (("<", False), (">", False), ("<", True)):
        samples = ramp(8, 8, 1, 16)
        found = source(tiff(samples, 16, 0, order=order, big=big))
        assert found.inverted
        assert opened(found.pieces).read() == tiff(samples, 16, 1, order=order, big=big)
        assert not source(tiff(samples, 16, 1, order=order, big=big)).inverted


def test_the_smallest_bmp():
    """Of 30 bytes: there is no number of colours to look at."""
    data = bmp(np.zeros((1, 1), np.uint32), 24, header=12)
    assert len(data) == 30
    assert source(data) == Source((data,))


def test_a_jpeg_of_arithmetic_codes_is_left_to_its_decoder():
    """Its encoder may leave out zeros at the end, so that nothing tells whether it is whole."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    data[data.index(b"\xff\xc0") + 1] = 0xC9
    assert source(bytes(data[:-2])) == Source((bytes(data[:-2]),))


def test_any_bytes_are_survived():
    """What is broken raises what a decoder may raise, or nothing."""
    jpeg = encode(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    for data in (PNG, jpeg, p.tiff(), picture(file_format="BMP"), p.animation("WEBP")):
        for end in range(len(data)):
            with suppress(ExcessiveStructureError, struct.error, ValueError, LookupError):
                source(data[:end])
