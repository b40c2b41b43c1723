"""Picture files that no encoder makes: hostile, broken and odd ones, built byte by byte."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from tests.wire import PNG, encode, picture

MB = 2**20
JPEG = picture(file_format="JPEG")
GIF = picture(file_format="GIF")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png_header(width: int, height: int, bits: int = 8, color: int = 2) -> bytes:
    fields = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return PNG_MAGIC + chunk(b"IHDR", fields)


def png_with(*chunks: bytes) -> bytes:
    """A good picture with more chunks behind its header."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def segment(marker: int, data: bytes = b"") -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def gif_with(blocks: bytes) -> bytes:
    """A good picture with more blocks before its first frame."""
    start = 13 + (3 << (GIF[10] & 7) + 1 if GIF[10] & 128 else 0)
    return GIF[:start] + blocks + GIF[start:]


def directory(*tags: tuple[int, int, int, bytes], at: int = 8) -> bytes:
    """A little-endian TIFF directory that lies at ``at``: number, kind, count and value of each."""
    behind = at + 2 + 12 * len(tags) + 4
    entries, values = struct.pack("<H", len(tags)), b""
    for number, kind, count, value in tags:
        entries += struct.pack("<HHL", number, kind, count)
        if len(value) <= 4:
            entries += value.ljust(4, b"\0")
        else:
            entries += struct.pack("<L", behind + len(values))
            values += value
    return entries + struct.pack("<L", 0) + values


def tiff(*more: tuple[int, int, int, bytes], width: int = 4, height: int = 4) -> bytes:
    """A grey TIFF with further tags."""
    short, long = struct.Struct("<H").pack, struct.Struct("<L").pack
    tags = [
        (256, 4, 1, long(width)),
        (257, 4, 1, long(height)),
        (258, 3, 1, short(8)),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(1)),
        (273, 4, 1, long(8)),
        (277, 3, 1, short(1)),
        (278, 4, 1, long(height)),
        (279, 4, 1, long(width * height)),
    ]
    return b"II*\0\x08\0\0\0" + directory(*tags, *more)


def many_rationals(count: int) -> bytes:
    return struct.pack("<LL", 1, 3) * count


def exif(orientation: int) -> bytes:
    return b"II*\0\x08\0\0\0" + directory((0x112, 3, 1, struct.pack("<H", orientation)))


def progressive(scans: int, between: bytes = b"") -> bytes:
    """A progressive JPEG of one colour; what follows its tenth scan is that scan again."""
    data = encode(Image.new("RGB", (2000, 2000), "red"), "JPEG", progressive=True, quality=1)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + between + data[last:-2] * (scans - 10) + b"\xff\xd9"


def lying(file_format: str, shown: int, real: int) -> bytes:
    """An AVIF or HEIC whose container promises ``shown`` pixels squared and brings ``real``."""
    data = encode(Image.new("RGB", (real, real), "red"), file_format, quality=1)
    box = data.index(b"ispe") + 8
    return data[:box] + struct.pack(">II", shown, shown) + data[box + 8 :]


def bmp_runs(width: int, height: int) -> bytes:
    """A run-length BMP, which Pillow decodes in Python."""
    data = (b"\xff\x11" * (width // 255) + b"\0\0") * height + b"\0\1"
    start = 14 + 40 + 64
    head = struct.pack("<LHHL", start + len(data), 0, 0, start)
    head += struct.pack("<LllHHLLllLL", 40, width, height, 1, 4, 2, len(data), 0, 0, 16, 0)
    return b"BM" + head + bytes(64) + data


def animation(file_format: str, frames: int = 3) -> bytes:
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "lime", "blue")]
    images = [images[index % 3] for index in range(frames)]
    return encode(images[0], file_format, save_all=True, append_images=images[1:])


def mode(name: str, file_format: str = "PNG", **options: object) -> bytes:
    return encode(Image.open(io.BytesIO(PNG)).convert(name), file_format, **options)


def sixteen_bits() -> bytes:
    return encode(Image.fromarray(np.full((64, 64), 40_000, np.uint16)))


def zipped(bomb: Callable[[bytes], bytes], size: int) -> bytes:
    """``bomb`` around ``size`` zero bytes, deflated."""
    return bomb(_deflated_zeros(size))


@cache
def _deflated_zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def packed_text(kind: str, size: int) -> bytes:
    """A PNG's chunk of a text or a profile that unpacks to ``size`` bytes, and packs badly."""
    text = random.Random(size).randbytes(size // 2).hex().encode()
    head = {"tEXt": b"", "zTXt": b"\0", "iCCP": b"\0", "iTXt": b"\1\0\0\0"}[kind]
    return chunk(kind.encode(), b"workflow\0" + head + (zlib.compress(text) if head else text))


def small_webp(image: Image.Image, canvas: tuple[int, int]) -> bytes:
    """An animated WebP of one frame, ``image``, at the top left of a larger canvas."""

    def riff(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<L", len(data)) + data + bytes(len(data) % 2)

    def three(*values: int) -> bytes:
        return b"".join(value.to_bytes(3, "little") for value in values)

    still = encode(image, "WEBP", lossless=True)[12:]
    frame = three(0, 0, image.width - 1, image.height - 1, 100) + b"\0" + still
    head = b"\2\0\0\0" + three(canvas[0] - 1, canvas[1] - 1)
    chunks = riff(b"VP8X", head) + riff(b"ANIM", bytes(6)) + riff(b"ANMF", frame)
    return riff(b"RIFF", b"WEBP" + chunks)
