"""Bytes to an RGB image, in memory and under limits.

What a viewer would show: EXIF orientation applied, transparency laid on white, the first frame of
an animation. ICC profiles are dropped, deliberately: the checkpoints were trained on pictures read
that way, and a profile is one more parser for hostile input.
"""

from __future__ import annotations

import pillow_heif
from PIL import ExifTags, Image, ImageChops

from qwenvl_app import process
from qwenvl_app.errors import BadRequest, TooLarge
from qwenvl_app.images.pieces import Pieces, opened
from qwenvl_app.images.samples import Samples, prepare, to_rgb, transparent_color
from qwenvl_app.images.source import source
from qwenvl_app.images.structure import check_structure

# Chosen by content, never by name. MPO, a phone's JPEG with a second picture, comes through JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
MAX_RATIO = 200  # what Qwen's smart_resize accepts (transformers, qwen2_vl image processing)

_MAX_EXIF = 2**20  # bytes; a larger one is not looked at. A phone's, with a preview in it, has 64K
_MAX_RUNS = 4_000_000  # pixels of a run-length BMP: decoded in Python, about a second for these
_UNREADABLE = "上传的文件无法作为图片读取，可能已损坏或格式不受支持。"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Previews, depth maps and the like are not looked at, so they need not be listed.
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
process.quiet_pillow()


def decode_image(data: bytes, *, max_megapixels: float) -> Image.Image:
    """Decode ``data`` to an 8-bit RGB image; nothing but memory is touched.

    Raises BadRequest for what is no readable picture or too narrow a one, and TooLarge, before
    decoding, for more than ``max_megapixels`` million pixels. Runs on the request's thread. Takes
    four bytes a pixel (Pillow's RGB), and for a moment twice that, or four times (WebP, 32 bits,
    PNG of 16 bits with a transparent colour).
    """
    try:
        check_structure(data)
        file = source(data)
        image, samples = _load(file.pieces, max_megapixels)
        if file.other_end:
            other, _ = _load(file.other_end, max_megapixels)
            if not _same(image, other):
                raise BadRequest(_UNREADABLE)
        turn = _TURNS.get(_orientation(image.info.get("exif")))
        image = image.transpose(turn) if turn is not None else image
        return to_rgb(image, samples, inverted=file.inverted)
    except (BadRequest, TooLarge, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise TooLarge(f"图片像素过多，超过 {max_megapixels:g} 百万像素的限制。") from None
    except Exception:
        # Decoders raise OSError, ValueError, SyntaxError, EOFError, struct.error and more, with
        # messages that can hold addresses (CVE-2026-22778): none of it is for the client.
        raise BadRequest(_UNREADABLE) from None


def _load(
    pieces: Pieces, max_megapixels: float, raw: str | None = None
) -> tuple[Image.Image, Samples]:
    """Header, size check, pixels; ``raw`` has Pillow unpack them in another way than its own."""
    with Image.open(opened(pieces), formats=FORMATS) as image:
        _check_size(image.width, image.height, max_megapixels)
        tile = image.tile[0] if image.tile else None
        if tile and tile[0] == "bmp_rle" and image.width * image.height > _MAX_RUNS:
            raise BadRequest(_UNREADABLE)
        samples = prepare(image)
        if tile and raw:
            image.tile = [tile._replace(args=raw)]
        image.load()
        # The same pixels without their file: its decoder may hold as much memory again.
        loaded = image._new(image.im)
    color = loaded.info.get("transparency")
    if raw is None and color and tile and tile[3] == "RGB;16B":
        lower, _ = _load(pieces, max_megapixels, "RGB;16L")
        loaded.putalpha(transparent_color(loaded, lower, color))
    return loaded, samples


def _same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures of one size and mode are, looked at in stripes to save memory."""
    for top in range(0, one.height, 256):
        box = (0, top, one.width, min(top + 256, one.height))
        if ImageChops.difference(one.crop(box), other.crop(box)).getbbox():
            return False
    return True


def _check_size(width: int, height: int, max_megapixels: float) -> None:
    if width < 1 or height < 1:
        raise BadRequest(_UNREADABLE)
    if width * height > max_megapixels * 1_000_000:
        raise TooLarge(f"图片为 {width}×{height} 像素，超过 {max_megapixels:g} 百万像素的限制。")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadRequest(
            f"图片的长宽比不能超过 {MAX_RATIO}，但收到的图片为 {width}×{height} 像素。"
        )


def _orientation(exif: bytes | None) -> int:
    """As EXIF has it, 1 to 8; what can't be read counts as 1, upright, as in a viewer.

    TIFF and HEIC come upright from their decoders. Copies of it in XMP or in a text chunk do not
    count: browsers ignore them. ``ImageOps.exif_transpose`` would copy an image
    that is upright, and write the EXIF of one that is not anew.
    """
    if not exif or len(exif) > _MAX_EXIF:
        return 1
    parsed = Image.Exif()
    try:
        parsed.load(exif)
        value = parsed.get(ExifTags.Base.Orientation)
    except Exception:  # whatever the parser stumbles over
        return 1
    return value if isinstance(value, int) else 1
