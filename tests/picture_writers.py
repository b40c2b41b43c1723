"""PNG, TIFF, BMP and GIF files of every kind, written sample by sample.

Who wrote the samples knows the picture: that is the reference in ``test_decoders_agree.py``. Every
writer takes samples of shape (rows, columns, channels) as the format has them, most significant
channel order as its specification names them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tests.pictures import PNG_MAGIC, chunk

Samples = npt.NDArray[np.uint32]

_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
_ADAM7 += ((1, 0, 2, 1),)  # first row, first column, and the steps, of each pass


def ramp(rows: int, columns: int, channels: int, bits: int, seed: int = 1) -> Samples:
    """Random samples of ``bits`` bits; the first two pixels are the least and the most."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 2**bits, (rows, columns, channels), dtype=np.uint32)
    samples[0, 0], samples[0, 1] = 0, 2**bits - 1
    return samples


def packed(row: npt.NDArray[np.uint32], bits: int, order: str = ">") -> bytes:
    """Samples side by side, the first in the upper bits; whole bytes in ``order``."""
    values = row.reshape(-1)
    if bits in (8, 16, 32):
        return values.astype(f"{order}u{bits // 8}").tobytes()
    each = (values[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(each.astype(np.uint8).reshape(-1)).tobytes()


# PNG (W3C's specification, third edition)


def _filtered(rows: Sequence[bytes], unit: int) -> bytes:
    """Each row under another of the five filters; ``unit`` is bytes a pixel, at least 1."""
    above, out = bytes(len(rows[0]) if rows else 0), b""
    for number, row in enumerate(rows):
        kind = number % 5
        out += bytes([kind])
        for at, value in enumerate(row):
            left = row[at - unit] if at >= unit else 0
            corner = above[at - unit] if at >= unit else 0
            up = above[at]
            nearest = min((left, up, corner), key=lambda it: abs(left + up - corner - it))
            guess = (0, left, up, (left + up) // 2, nearest)[kind]
            out += bytes([(value - guess) & 255])
        above = row
    return out


def png(
    samples: Samples,
    bits: int,
    color: int,
    *,
    before: bytes = b"",
    interlaced: bool = False,
) -> bytes:
    """A PNG of ``color`` type; ``before`` are chunks such as PLTE and tRNS."""
    height, width, channels = samples.shape
    data = b""
    for row, column, down, right in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[row::down, column::right]
        if part.size:
            rows = [packed(line, bits) for line in part]
            data += _filtered(rows, max(1, channels * bits // 8))
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    data = zlib.compress(data)
    pixels = chunk(b"IDAT", data[:50]) + chunk(b"IDAT", data[50:])
    return PNG_MAGIC + chunk(b"IHDR", head) + before + pixels + chunk(b"IEND")


# TIFF (revision 6.0, and Adobe's technical notes)

_TIFF_SIZES = {3: 2, 4: 4}


def tiff(
    samples: Samples,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    compression: int = 1,
    planar: bool = False,
    tile: int = 0,
    fill_order: int = 1,
    predictor: int = 1,
    big: bool = False,
    more: Sequence[tuple[int, int, Sequence[int]]] = (),
) -> bytes:
    """A TIFF; ``more`` are further tags: number, kind (3 short, 4 long) and values."""
    height, width, channels = samples.shape
    planes = [samples[:, :, i : i + 1] for i in range(channels)] if planar else [samples]
    high, wide = (tile, tile) if tile else (max(1, height // 2), width)
    parts = []
    for plane in planes:
        for top in range(0, height, high):
            for left in range(0, width, wide):
                part = plane[top : top + high, left : left + wide]
                if tile:
                    rest = ((0, high - part.shape[0]), (0, wide - part.shape[1]), (0, 0))
                    part = np.pad(part, rest)
                parts.append(_tiff_part(part, bits, order, compression, predictor, fill_order))
    lengths = [len(part) for part in parts]
    start = 16 if big else 8
    offsets = [start + sum(lengths[:i]) for i in range(len(parts))]
    tags: list[tuple[int, int, Sequence[int]]] = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * channels),
        (259, 3, [compression]),
        (262, 3, [photometric]),
        (266, 3, [fill_order]),
        (277, 3, [channels]),
        (284, 3, [2 if planar else 1]),
        (317, 3, [predictor]),
        *more,
    ]
    if tile:
        tags += [(322, 3, [tile]), (323, 3, [tile]), (324, 4, offsets), (325, 4, lengths)]
    else:
        tags += [(273, 4, offsets), (278, 3, [high]), (279, 4, lengths)]
    body = b"".join(parts)
    body += bytes(len(body) % 2)
    return (
        _tiff_head(start + len(body), order, big)
        + body
        + _tiff_tags(sorted(tags), start + len(body), order, big)
    )


def _tiff_part(
    part: Samples, bits: int, order: str, compression: int, predictor: int, fill_order: int
) -> bytes:
    if predictor == 2:
        part = part.copy()
        part[:, 1:] -= part[:, :-1].copy()
        part &= np.uint32(2**bits - 1)
    rows = [packed(row, bits, order) for row in part]
    if compression == 32773:
        return b"".join(
            bytes([len(row[i : i + 128]) - 1]) + row[i : i + 128]
            for row in rows
            for i in range(0, len(row), 128)
        )
    data = b"".join(rows)
    if compression == 8:
        return zlib.compress(data)
    if fill_order == 2:
        return bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    return data


def _tiff_head(directory: int, order: str, big: bool) -> bytes:
    mark = b"II" if order == "<" else b"MM"
    if big:
        return mark + struct.pack(order + "HHHQ", 43, 8, 0, directory)
    return mark + struct.pack(order + "HL", 42, directory)


def _tiff_tags(
    tags: Sequence[tuple[int, int, Sequence[int]]], at: int, order: str, big: bool
) -> bytes:
    room = 8 if big else 4
    out = struct.pack(order + ("Q" if big else "H"), len(tags))
    behind = at + len(out) + len(tags) * (20 if big else 12) + room
    values = b""
    for number, kind, numbers in tags:
        raw = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'L'}", *numbers)
        out += struct.pack(order + ("HHQ" if big else "HHL"), number, kind, len(numbers))
        if len(raw) <= room:
            out += raw.ljust(room, b"\0")
        else:
            out += struct.pack(order + ("Q" if big else "L"), behind + len(values))
            values += raw
    return out + bytes(room) + values


# BMP (Microsoft's "Bitmap storage", OS/2's "Bitmap file format")


def bmp(
    samples: Samples,
    bits: int,
    *,
    header: int = 40,
    palette: Sequence[tuple[int, int, int]] = (),
    masks: Sequence[int] = (),
    top_down: bool = False,
) -> bytes:
    """A BMP of whole pixels, shape (rows, columns): indices, or what 16 to 32 bits hold.

    With ``masks`` of red, green, blue and maybe alpha it has bit fields.
    """
    height, width = samples.shape
    order = samples if top_down else samples[::-1]
    data = b"".join(_bmp_row(row, bits) for row in order)
    if header == 12:
        info = struct.pack("<LHHHH", 12, width, height, 1, bits)
        colors = b"".join(bytes(color[::-1]) for color in palette)
    else:
        signed = -height if top_down else height
        info = struct.pack("<LllHH", header, width, signed, 1, bits)
        info += struct.pack("<LLllLL", 3 if masks else 0, len(data), 2835, 2835, len(palette), 0)
        colors = b"".join(bytes(color[::-1]) + b"\0" for color in palette)
    fields = b"".join(struct.pack("<L", mask) for mask in masks)
    if header == 40 and masks:
        info += fields[:12]
    elif header == 64:
        info += bytes(24)
    elif header > 40:
        info += fields.ljust(header - 40, b"\0")[: header - 40]
        if header >= 108:
            info = info[:56] + b"BGRs" + info[60:]
    start = 14 + len(info) + len(colors)
    return b"BM" + struct.pack("<LHHL", start + len(data), 0, 0, start) + info + colors + data


def _bmp_row(row: npt.NDArray[np.uint32], bits: int) -> bytes:
    if bits == 24:
        data = row.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    else:
        data = packed(row, bits, "<")
    return data + bytes(-len(data) % 4)


# GIF (CompuServe's version 89a)


def gif(
    indices: Samples,
    palette: Sequence[tuple[int, int, int]],
    *,
    canvas: tuple[int, int] | None = None,
    at: tuple[int, int] = (0, 0),
    transparent: int | None = None,
    background: int = 0,
    local: bool = False,
    disposal: int = 0,
    interlaced: bool = False,
    trailer: bytes = b";",
) -> bytes:
    """One frame of shape (rows, columns), at ``at`` (x, y) on a ``canvas`` (width, height)."""
    height, width = indices.shape
    bits = max(2, (len(palette) - 1).bit_length())
    colors = b"".join(bytes(color) for color in palette).ljust(3 << bits, b"\0")
    table = 0x80 | (bits - 1)
    screen = struct.pack("<HH", *(canvas or (width, height)))
    screen += bytes([0 if local else table, background, 0])
    control = b"!\xf9\x04" + bytes([disposal << 2 | (transparent is not None), 0, 0])
    control += bytes([transparent or 0, 0])
    frame = b"," + struct.pack("<HHHH", *at, width, height)
    frame += bytes([(table if local else 0) | (0x40 if interlaced else 0)])
    order = list(range(height))
    if interlaced:
        order = [*order[::8], *order[4::8], *order[2::4], *order[1::2]]
    codes = b"".join(_gif_codes(indices[order].reshape(-1), bits))
    blocks = b"".join(
        bytes([len(codes[i : i + 255])]) + codes[i : i + 255] for i in range(0, len(codes), 255)
    )
    return (
        b"GIF89a" + screen + (b"" if local else colors) + control + frame
        + (colors if local else b"") + bytes([bits]) + blocks + b"\0" + trailer
    )  # fmt: skip


def _gif_codes(indices: npt.NDArray[np.uint32], bits: int) -> Iterator[bytes]:
    """LZW that never uses its table: it is cleared before codes grow."""
    clear, word, filled = 1 << bits, 0, 0
    codes: list[int] = []
    for number, index in enumerate(indices):
        if number % (clear - 2) == 0:
            codes.append(clear)
        codes.append(int(index))
    for code in [*codes, clear + 1]:
        word |= code << filled
        filled += bits + 1
        while filled >= 8:
            yield bytes([word & 255])
            word >>= 8
            filled -= 8
    if filled:
        yield bytes([word])
