"""A picture as a file that any decoder shows as ``decode_image`` did.

vLLM and SGLang decode with Pillow, llama-server with stb_image. They do not agree about a turn in
EXIF, about transparency, or about what is not whole: none of that is left to them.
"""

from __future__ import annotations

import io

from PIL import ExifTags, Image, JpegImagePlugin

from qwenvl_app.images.pieces import opened
from qwenvl_app.images.source import source
from qwenvl_app.images.structure import png_chunks

_SAFE_MODES = ("RGB", "L")
_FEW_PIXELS = 1_000_000  # up to here deflate may take its time
_PNG_SAFE = (b"\x08\x00", b"\x08\x02")  # 8 bits a sample, grey or RGB
_PNG_UNSAFE = (b"tRNS", b"eXIf", b"acTL")


def encode(image: Image.Image, original: bytes | None = None) -> tuple[str, bytes]:
    """A media type and a file of ``image``, which was decoded from ``original``.

    That file itself, where decoders agree about it: an upright JPEG of one picture; a PNG of 8 bits
    without transparency, less the chunks that are no picture. Another JPEG is compressed anew with
    its own tables: it keeps its size and loses what a second time loses. All else is a PNG, which
    loses nothing. On the caller's thread; a photo that is compressed anew takes it tenths of a
    second.
    """
    if original and original.startswith(b"\xff\xd8\xff"):
        if _is_plain_jpeg(original):
            return "image/jpeg", original
        if again := _jpeg_again(image, original):
            return "image/jpeg", again
    plain = _plain_png(original) if original and original.startswith(b"\x89PNG") else None
    return "image/png", plain or _png(image)


def _is_plain_jpeg(data: bytes) -> bool:
    shown = source(data)
    if shown.pieces != (data,) or shown.other_end:
        return False
    with Image.open(opened(shown.pieces), formats=("JPEG",)) as file:
        turn = file.getexif().get(ExifTags.Base.Orientation, 1)
        return file.format == "JPEG" and file.mode in _SAFE_MODES and turn == 1


def _jpeg_again(image: Image.Image, original: bytes) -> bytes | None:
    """``image`` with the quantisation and the subsampling of ``original``; None if it has others'.

    That is a JPEG of four colours. Tables are turned with the picture.
    """
    with Image.open(io.BytesIO(original), formats=("JPEG",)) as file:
        if not isinstance(file, JpegImagePlugin.JpegImageFile) or file.mode not in _SAFE_MODES:
            return None
        turned = file.size != image.size
        tables = [
            [table[place % 8 * 8 + place // 8] for place in range(64)] if turned else list(table)
            for table in file.quantization.values()
        ]
        grey = file.mode == "L"
        sampling = JpegImagePlugin.get_sampling(file)
    buffer = io.BytesIO()
    shown = image.convert("L") if grey else image
    # -1 is a subsampling that Pillow has no name for; 0 is none, which loses least.
    shown.save(buffer, "JPEG", qtables=tables, subsampling=max(sampling, 0))
    return buffer.getvalue()


def _plain_png(data: bytes) -> bytes | None:
    """The chunks of ``data`` that are its picture, if no decoder has a choice about them."""
    if data[24:26] not in _PNG_SAFE:
        return None
    if any(kind in _PNG_UNSAFE for kind, _, _ in png_chunks(data)):
        return None
    return b"".join(source(data).pieces)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    level = 6 if image.width * image.height <= _FEW_PIXELS else 1
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()
