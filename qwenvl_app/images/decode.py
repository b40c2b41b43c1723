"""Bytes to an RGB image, in memory and under limits.

What a viewer would show: EXIF orientation applied, transparency laid on white, the first frame of
an animation. ICC profiles are dropped, deliberately: the checkpoints were trained on pictures read
that way, and a profile is one more parser for hostile input.
"""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import pillow_heif
from PIL import ExifTags, Image

from qwenvl_app.errors import BadRequest, TooLarge
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
# Pillow warns of odd files in words that depend on them, and Python keeps every text it has shown:
# a line in the log for each file, and memory that is never given back.
warnings.filterwarnings("ignore", module=r"PIL\.")
# It logs an error for some broken files, too; what a client sends is none of the service's.
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode_image(data: bytes, *, max_megapixels: float) -> Image.Image:
    """Decode ``data`` to an 8-bit RGB image; nothing but memory is touched.

    Raises BadRequest for what is no readable picture or too narrow a one, and TooLarge, before
    decoding, for more than ``max_megapixels`` million pixels. Runs on the request's thread. Takes
    four bytes a pixel (Pillow's RGB), and for a moment twice that, or four times (WebP, 32 bits).
    """
    try:
        check_structure(data)
        image = _load(data, max_megapixels)
        turn = _TURNS.get(_orientation(image.info.get("exif")))
        return _to_rgb(image.transpose(turn) if turn is not None else image)
    except (BadRequest, TooLarge, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise TooLarge(f"图片像素过多，超过 {max_megapixels:g} 百万像素的限制。") from None
    except Exception:
        # Decoders raise OSError, ValueError, SyntaxError, EOFError, struct.error and more, with
        # messages that can hold addresses (CVE-2026-22778): none of it is for the client.
        raise BadRequest(_UNREADABLE) from None


def _load(data: bytes, max_megapixels: float) -> Image.Image:
    """Header, size check, pixels."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.width, image.height, max_megapixels)
        if image.tile and image.tile[0][0] == "bmp_rle" and image.width * image.height > _MAX_RUNS:
            raise BadRequest(_UNREADABLE)
        image.load()
        # The same pixels without their file: its decoder may hold as much memory again.
        return image._new(image.im)


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        layer = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to its upper byte; 32-bit grey, whose range no file states, stretched to fit."""
    if image.mode.startswith("I;16"):
        words = np.asarray(image).astype(np.uint32)
        words *= 255  # with the next two, value / 257 to the nearest
        words += 32895
        words >>= 16
        return Image.fromarray(words.astype(np.uint8), "L")
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    with np.errstate(over="ignore"):  # of values at both ends of what a float can be
        values -= low
    values *= 255 / (high - low) if high > low else 0
    np.clip(values.round(out=values), 0, 255, out=values)
    return Image.fromarray(values.astype(np.uint8), "L")
