"""Bytes to an RGB image, in memory and under limits.

What a viewer would show: EXIF orientation applied, transparency laid on white, the first frame of
an animation. ICC profiles are dropped, deliberately: the checkpoints were trained on pictures read
that way, and a profile is one more parser for hostile input.
"""

from __future__ import annotations

import io

import numpy as np
import pillow_heif
from PIL import Image, ImageOps

from qwenvl_app.errors import BadRequest, TooLarge

# Chosen by content, never by name. MPO, a phone's JPEG with a second picture, comes through JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
MAX_RATIO = 200  # what Qwen's smart_resize accepts (transformers, qwen2_vl image processing)

_UNREADABLE = "上传的文件无法作为图片读取，可能已损坏或格式不受支持。"

pillow_heif.register_heif_opener()


def decode_image(data: bytes, *, max_megapixels: float) -> Image.Image:
    """Decode ``data`` to an 8-bit RGB image; nothing but memory is touched.

    Raises BadRequest for what is no readable picture or too narrow a one, and TooLarge, before
    decoding, for more than ``max_megapixels`` million pixels. Runs on the request's thread.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_megapixels)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (BadRequest, TooLarge):
        raise
    except Image.DecompressionBombError:
        raise TooLarge(f"图片像素过多，超过 {max_megapixels:g} 百万像素的限制。") from None
    except MemoryError:
        raise
    except Exception:
        # Decoders raise OSError, ValueError, SyntaxError, EOFError, struct.error and more, with
        # messages that can hold addresses (CVE-2026-22778): none of it is for the client.
        raise BadRequest(_UNREADABLE) from None


def _check_size(width: int, height: int, max_megapixels: float) -> None:
    if width < 1 or height < 1:
        raise BadRequest(_UNREADABLE)
    if width * height > max_megapixels * 1_000_000:
        raise TooLarge(f"图片为 {width}×{height} 像素，超过 {max_megapixels:g} 百万像素的限制。")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadRequest(
            f"图片的长宽比不能超过 {MAX_RATIO}，但收到的图片为 {width}×{height} 像素。"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to its upper byte; 32-bit grey, whose range no file states, stretched to fit."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        values /= 257
    else:
        low, high = values.min(), values.max()
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(values.round().astype(np.uint8), "L")
