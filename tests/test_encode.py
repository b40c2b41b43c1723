"""Pictures as they are sent on: what another decoder makes of them is what ours made."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from qwenvl_app.images.decode import decode_image
from qwenvl_app.images.encode import encode
from tests.wire import encode as as_file
from tests.wire import picture

ORIENTATION = 0x0112


def photo(size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Smooth in places and rough in others, as photos are."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.SHARPEN)


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return as_file(photo(), "JPEG", quality=90, exif=exif)


def sent(data: bytes) -> tuple[str, bytes, np.ndarray, np.ndarray]:
    """Kind and file, what the upstream's decoder makes of it, and what ours made."""
    image = decode_image(data, max_megapixels=50)
    kind, file = encode(image, data)
    with Image.open(io.BytesIO(file)) as theirs:
        assert f"image/{theirs.format}".lower() == kind
        # A decoder that knows nothing of EXIF or transparency.
        return kind, file, np.asarray(theirs.convert("RGB")), np.asarray(image)


def test_a_plain_photo_is_sent_as_it_came():
    data = as_file(photo(), "JPEG", quality=80)
    kind, file, theirs, ours = sent(data)
    assert (kind, file) == ("image/jpeg", data)
    assert (theirs == ours).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_png_is_sent_without_what_is_no_picture(mode: str):
    buffer = io.BytesIO()
    photo().convert(mode).save(buffer, "PNG", dpi=(72, 72), icc_profile=b"x" * 500)
    kind, file, theirs, ours = sent(buffer.getvalue())
    assert kind == "image/png"
    assert len(file) < len(buffer.getvalue())
    assert b"iCCP" not in file
    assert (theirs == ours).all()


@pytest.mark.parametrize("number", range(2, 9))
def test_a_photo_that_is_turned_is_sent_upright(number: int):
    """With its own tables: as large as it was, and as good but for the second time."""
    data = turned(number)
    kind, file, theirs, ours = sent(data)
    assert kind == "image/jpeg"
    assert theirs.shape == ours.shape
    assert np.abs(theirs.astype(int) - ours).mean() < 1.5
    assert len(file) < len(data) * 1.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA"])
def test_all_else_is_sent_without_loss(name: str, options: dict, mode: str):
    image = photo((64, 48)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = as_file(image, name, **options)
    kind, _, theirs, ours = sent(data)
    assert kind == "image/png"
    assert (theirs == ours).all()


def test_four_colours_and_half_a_file_are_nobody_elses_business():
    data = as_file(photo().convert("CMYK"), "JPEG", quality=90)
    kind, _, theirs, ours = sent(data)
    assert kind == "image/png"
    assert (theirs == ours).all()
    without_end = as_file(photo(), "JPEG", quality=90)[:-2]
    kind, file, _, _ = sent(without_end)
    assert kind == "image/jpeg"
    assert file.endswith(b"\xff\xd9")


def test_without_its_file_it_is_a_png():
    image = decode_image(picture(), max_megapixels=1)
    kind, file = encode(image)
    assert kind == "image/png"
    with Image.open(io.BytesIO(file)) as theirs:
        assert (np.asarray(theirs) == np.asarray(image)).all()
