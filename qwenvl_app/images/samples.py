"""A decoded picture's samples, whatever they are, to 8-bit RGB as a viewer shows it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImagePalette
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

_UNSIGNED = 1  # of TIFF's sample formats
_BITS, _PLANAR, _COLORS, _EXTRA, _FORMAT = 258, 284, 320, 338, 339  # TIFF's tags
_PNG_GREY = {"L;2": 3, "L;4": 15}  # Pillow's raw modes and the largest sample of each
# What Pillow means for a file's own order, though libtiff hands it the machine's.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


class Samples(NamedTuple):
    """What a file says of its samples, and Pillow's mode does not."""

    bits: int = 16  # of a grey one of more than 8
    kind: int = _UNSIGNED
    declared: bool = True  # that the fourth is alpha
    covered: tuple[int, int, int, int] | None = None  # of a GIF's canvas, by its first frame


def prepare(image: ImageFile) -> Samples:
    """To be called before ``image`` is loaded: corrects how Pillow is going to unpack it."""
    if isinstance(image, TiffImageFile):
        return _prepare_tiff(image)
    if image.format == "PNG" and image.tile:
        raw, color = image.tile[0].args, image.info.get("transparency")
        if raw in _PNG_GREY and isinstance(color, int):
            largest = _PNG_GREY[raw]  # Pillow stretches samples, but not the transparent one
            image.info["transparency"] = (color & largest) * (255 // largest)
    if image.format == "GIF" and image.tile:
        extents = image.tile[0].extents
        if extents != (0, 0, *image.size):
            return Samples(covered=extents)
    return Samples(declared=image.format != "BMP")


def _prepare_tiff(image: TiffImageFile) -> Samples:
    tags = image.tag_v2
    if image.mode == "LAB" and tags.get(_PLANAR) == 2:
        raise ValueError("Pillow would take signed planes for unsigned ones")
    bits, kinds = tags.get(_BITS, (1,)), tags.get(_FORMAT, (_UNSIGNED,))
    for number, (codec, _, _, args) in enumerate(image.tile):
        raw, *others = args if isinstance(args, tuple) else (args,)
        if codec == "libtiff":
            raw = _NATIVE.get(raw, raw)
        elif bits[0] == 16 and len(raw) == 1:  # a plane, which Pillow takes for one of 8 bits
            raw += ";16L" if tags.prefix == b"II" else ";16B"
        image.tile[number] = image.tile[number]._replace(args=(raw, *others))
    if image.mode in ("P", "PA") and max(tags[_COLORS]) < 256:
        # Colours have 16 bits; of 8 they are where a writer erred, and where libtiff takes them so.
        image.palette = ImagePalette.raw("RGB;L", tuple(tags[_COLORS]))
    return Samples(bits[0], kinds[0], declared=_EXTRA in tags)


def to_rgb(image: Image.Image, samples: Samples, *, inverted: bool = False) -> Image.Image:
    """``image`` in 8 bits on white. ``inverted``: its grey is white at 0."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image, samples)
    if inverted:
        image = _inverted(image)
    if (
        not samples.declared
        and image.mode == "RGBA"
        and image.getchannel("A").getextrema() == (0, 0)
    ):
        image = image.convert("RGB")
    if image.has_transparency_data:
        image = _on_white(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if samples.covered:
        frame = image.crop(samples.covered)
        image = Image.new("RGB", image.size, "white")
        image.paste(frame, samples.covered)
    return image


def transparent_color(
    upper: Image.Image, lower: Image.Image, color: tuple[int, int, int]
) -> Image.Image:
    """The alpha of a picture of 16 bits a sample, by its one transparent colour.

    Of ``upper`` and ``lower`` the one has the upper bytes and the other the lower ones: two colours
    that differ in the lower ones alone are two.
    """
    alphas = []
    for image, shift in ((upper, 8), (lower, 0)):
        image.info["transparency"] = tuple(value >> shift & 255 for value in color)
        alphas.append(image.convert("RGBA").getchannel("A"))
        del image.info["transparency"]
    return ImageChops.lighter(*alphas)


def _on_white(image: Image.Image) -> Image.Image:
    # LA too: Pillow pastes it as if it were RGB, which it is not always.
    image = image.convert("LA") if image.mode == "La" else image  # it has no other way to RGBA
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    image = Image.new("RGB", layer.size, "white")
    image.paste(layer, mask=layer)
    return image


def _inverted(image: Image.Image) -> Image.Image:
    if image.mode in ("1", "L"):
        return ImageChops.invert(image.convert("L"))
    grey, alpha = image.convert("LA").split()
    return Image.merge("LA", (ImageChops.invert(grey), alpha))


def _to_eight_bits(image: Image.Image, samples: Samples) -> Image.Image:
    """16-bit grey to its upper byte; 32-bit grey, whose range no file states, stretched to fit."""
    if image.mode.startswith("I;16"):
        return _from_words(image, samples.bits)
    read = np.array(image)
    if samples.kind == _UNSIGNED and samples.bits == 32:
        read = read.view(np.uint32)
    values = read.astype(np.float32, copy=False)
    np.nan_to_num(values, copy=False, nan=0, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    with np.errstate(over="ignore"):  # of values at both ends of what a float can be
        values -= low
    values *= 255 / (high - low) if high > low else 0
    np.clip(values.round(out=values), 0, 255, out=values)
    return Image.fromarray(values.astype(np.uint8), "L")


def _from_words(image: Image.Image, bits: int) -> Image.Image:
    words = np.asarray(image).astype(np.uint32)
    color = image.info.get("transparency")
    alpha = (
        None if color is None else Image.fromarray(np.where(words == color, 0, 255).astype("u1"))
    )
    words *= 255 * 65535 // (2**bits - 1)  # with the next two, value / 257 to the nearest
    words += 32895
    words >>= 16
    grey = Image.fromarray(words.astype(np.uint8), "L")
    return grey if alpha is None else Image.merge("LA", (grey, alpha))
