"""Every kind of PNG, TIFF, BMP and GIF, against its writer, which knows the picture, and libvips.

A picture is the same within 2 levels, or a table here says why it is not, and is held to it.
"""

from __future__ import annotations

import itertools
import logging
import struct
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import pyvips

from qwenvl_app.errors import BadRequest
from qwenvl_app.images.decode import decode_image
from tests.corpus import pillow_images
from tests.picture_writers import Samples, bmp, gif, png, ramp, tiff
from tests.pictures import chunk

# It warns of odd files from threads of its own, which logging makes known to Python for ever.
logging.getLogger("pyvips").setLevel(logging.CRITICAL)

WITHIN = 2  # levels of 255
ROWS, COLUMNS = 11, 19
Picture = npt.NDArray[Any]

_PLANE = "Pillow takes no uncompressed plane that is not a band of its mode"
# What is refused, by name, and why.
REFUSED = {
    "tiff * grey16+alpha *": "Pillow has no mode for it",
    "tiff * grey16+unspecified *": "Pillow has no mode for it",
    "tiff MM * grey12 *": "Pillow unpacks 12 bits in little-endian files only",
    "tiff MM * grey32 *": "Pillow unpacks 32 unsigned bits in little-endian files only",
    "tiff MM fill *16 *": "Pillow turns round the bits of bytes only",
    "tiff MM big *": "Pillow takes no big-endian BigTIFF",
    "tiff ?? none rgb*+unspecified planes": _PLANE,
    "tiff ?? none rgb*+associated planes": _PLANE,
    "tiff ?? none cmyk16 planes": "Pillow has no raw mode for it",
    "tiff ?? none YCbCr planes": _PLANE,
    "tiff * Lab planes": "Pillow takes the signs of its planes for bits",
    "tiff * LogLuv *": "Pillow has no mode for it",
    "tiff * mask *": "a mask is no picture",
    "bmp * BGRX": "Pillow has no raw mode for it",
    "bmp * 10-10-10": "Pillow has no raw mode for it",
    "bmp * 4-4-4-4": "Pillow has no raw mode for it",
    "bmp * 4 bits, sixteen blacks": "Pillow takes grey of its own order for 8 bits a pixel",
}
# What is read, but not as it was written.
OTHERWISE = {
    "tiff II * half grey32 *": "no file states the range of 32 bits: they are stretched to fit",
    "tiff * signed8 *": "bytes that are called signed are not (Pillow's own 8bit.s.tif)",
    "tiff * rgb16+associated *": "divided by the alpha in 8 bits: up to 4 levels",
    "tiff ?? [!n]* rgb*+undeclared zero planes": "Pillow has divided by it already",
    "bmp * 1-5-5-5": "Pillow ignores alpha in 16 bits",
}
# Where libvips is no reference.
NOT_VIPS = {
    "bmp *": "it has no decoder of them",
    "tiff * grey12 *": "it has no 12 bits",
    "tiff * grey32 *": "it cuts 32 bits down",
    "tiff * float *": "it does not stretch",
    "tiff * signed*": "it takes them for what they are called, and cuts below 0",
    "tiff * ?*+unspecified*": "it takes any further sample for alpha",
    "tiff * ?*+undeclared zero*": "it takes the fourth sample for alpha",
    "tiff * cmyk*": "it has colour management",
    "tiff * Lab *": "it takes Lab of 16 bits only",
    "tiff * YCbCr *": "it takes YCbCr for RGB where there is no JPEG",
    "tiff * grey[124] one plane": "it takes planes for bytes",
    "tiff * palette[124] one plane": "it takes planes for bytes",
    "gif * small*": "it shows black where a browser shows nothing",
}


class Case(NamedTuple):
    name: str
    data: bytes
    picture: Picture  # of shape (rows, columns, 1 or 3), 0 to 255


def eight(samples: Samples, bits: int) -> Picture:
    return samples.astype(np.float64) * 255 / (2**bits - 1)


def on_white(color: Picture, alpha: Picture) -> Picture:
    return 255 - (255 - color) * alpha / 255


def colors(count: int, levels: int = 256) -> Picture:
    return np.random.default_rng(count).integers(0, levels, (count, 3))


def shorts(*values: Any) -> bytes:
    return struct.pack(f">{len(values)}H", *(int(value) for value in values))


def png_cases() -> Iterator[Case]:
    for interlaced in (False, True):

        def case(
            name: str,
            samples: Samples,
            bits: int,
            color: int,
            picture: Picture,
            before: bytes = b"",
            interlaced: bool = interlaced,
        ) -> Case:
            data = png(samples, bits, color, before=before, interlaced=interlaced)
            return Case(f"png {name}{' interlaced' if interlaced else ''}", data, picture)

        for bits in (1, 2, 4, 8, 16):
            grey = ramp(ROWS, COLUMNS, 1, bits)
            shown = eight(grey, bits)
            yield case(f"grey{bits}", grey, bits, 0, shown)
            for clear in {0, 1, 2**bits // 3, int(grey[5, 5, 0]), 2**bits - 1}:
                picture = np.where(grey == clear, 255, shown)
                trns = chunk(b"tRNS", shorts(clear))
                yield case(f"grey{bits} tRNS {clear}", grey, bits, 0, picture, trns)
        for bits in (1, 2, 4, 8):
            indices, palette = ramp(ROWS, COLUMNS, 1, bits), colors(2**bits)
            plte = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
            shown = palette[indices[:, :, 0]]
            yield case(f"palette{bits}", indices, bits, 3, shown, plte)
            for name, alpha in {
                "alphas": np.random.default_rng(bits).integers(0, 256, 2**bits),
                "one": np.array([255, 0] + [255] * (2**bits - 2)),
                "short": np.array([100]),
            }.items():
                all_alpha = np.append(alpha, [255] * (2**bits - len(alpha)))[indices]
                before = plte + chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
                yield case(
                    f"palette{bits} tRNS {name}",
                    indices,
                    bits,
                    3,
                    on_white(shown, all_alpha),
                    before,
                )
        for bits in (8, 16):
            rgb = ramp(ROWS, COLUMNS, 3, bits)
            yield case(f"rgb{bits}", rgb, bits, 2, eight(rgb, bits))
            clear = rgb[5, 5].copy()
            rgb[6, 6] = rgb[7:9, 3:9] = clear
            rgb[7, 4:7, 1] ^= 1  # as good as the same, and another colour
            picture = np.where((rgb == clear).all(2, keepdims=True), 255, eight(rgb, bits))
            yield case(f"rgb{bits} tRNS", rgb, bits, 2, picture, chunk(b"tRNS", shorts(*clear)))
            for color, channels in ((4, 2), (6, 4)):
                both = ramp(ROWS, COLUMNS, channels, bits)
                shown = eight(both, bits)
                picture = on_white(shown[:, :, :-1], shown[:, :, -1:])
                yield case(f"{channels - 1}+alpha {bits}", both, bits, color, picture)


def tiff_cases() -> Iterator[Case]:
    for order, (packing, compression) in itertools.product(
        "<>", {"none": 1, "deflate": 8, "packbits": 32773}.items()
    ):
        name = f"tiff {'II' if order == '<' else 'MM'} {packing}"

        def write(
            *args: Any, order: str = order, compression: int = compression, **kw: Any
        ) -> bytes:
            return tiff(*args, order=order, compression=compression, **kw)

        yield from _tiff_grey(name, write)
        yield from _tiff_palette(name, write)
        yield from _tiff_color(name, write)
    for order in "<>":
        yield from _tiff_layouts(order)


def _tiff_grey(name: str, write: Callable[..., bytes]) -> Iterator[Case]:
    for photometric, zero in ((0, "white"), (1, "black")):

        def turned(picture: Picture, photometric: int = photometric) -> Picture:
            return picture if photometric else 255 - picture

        for bits in (1, 2, 4, 8, 12, 16, 32):
            grey = ramp(ROWS, COLUMNS, 1, bits)
            shown = turned(eight(grey, bits))
            yield Case(f"{name} grey{bits} {zero}", write(grey, bits, photometric), shown)
            if bits == 32:
                data = write(grey // 2, bits, photometric)
                yield Case(f"{name} half grey32 {zero}", data, turned(eight(grey // 2, bits)))
            if bits in (1, 2, 4, 8, 16):
                data = write(grey, bits, photometric, planar=True)
                yield Case(f"{name} {zero} grey{bits} one plane", data, shown)
        for bits in (8, 16):
            grey = ramp(ROWS, COLUMNS, 1, bits)
            signed = (grey + 2 ** (bits - 1)) % 2**bits
            data = write(signed, bits, photometric, more=[(339, 3, [2])])
            yield Case(f"{name} signed{bits} {zero}", data, turned(eight(grey, bits)))
            both = ramp(ROWS, COLUMNS, 2, bits)
            shown, alpha = np.split(eight(both, bits), 2, axis=2)
            data = write(both, bits, photometric, more=[(338, 3, [2])])
            yield Case(f"{name} grey{bits}+alpha {zero}", data, on_white(turned(shown), alpha))
            data = write(both, bits, photometric, more=[(338, 3, [0])])
            yield Case(f"{name} grey{bits}+unspecified {zero}", data, turned(shown))
        real = np.random.default_rng(3).random((ROWS, COLUMNS, 1), dtype=np.float32)
        real[0, 0], real[0, 1] = 0, 1
        data = write(real.view(np.uint32), 32, photometric, more=[(339, 3, [3])])
        yield Case(f"{name} float {zero}", data, turned(real * 255))
    both = ramp(ROWS, COLUMNS, 2, 8)
    both[:, :, 0] = both[:, :, 0] * both[:, :, 1] // 255
    data = write(both, 8, 1, more=[(338, 3, [1])])
    yield Case(f"{name} grey8+associated", data, both[:, :, :1] + 255.0 - both[:, :, 1:])
    yield Case(f"{name} mask 1", write(ramp(ROWS, COLUMNS, 1, 1), 1, 4), np.zeros((1, 1, 1)))


def _tiff_palette(name: str, write: Callable[..., bytes]) -> Iterator[Case]:
    for bits in (1, 2, 4, 8):
        indices = ramp(ROWS, COLUMNS, 1, bits)
        for levels in (256, 65536):
            palette = colors(2**bits, levels)
            shown = palette[indices[:, :, 0]] * 255 / (levels - 1)
            more = [(320, 3, palette.T.reshape(-1).tolist())]
            data = write(indices, bits, 3, more=more)
            yield Case(f"{name} palette{bits} of {levels}", data, shown)
            data = write(indices, bits, 3, more=more, planar=True)
            yield Case(f"{name} of {levels} palette{bits} one plane", data, shown)


def _tiff_color(name: str, write: Callable[..., bytes]) -> Iterator[Case]:
    for planar, bits in itertools.product((False, True), (8, 16)):
        tail = "planes" if planar else "pixels"

        def case(
            kind: str,
            samples: Samples,
            photometric: int,
            picture: Picture,
            extra: int | None = None,
            layout: tuple[bool, int, str] = (planar, bits, tail),
        ) -> Case:
            more = [] if extra is None else [(338, 3, [extra])]
            planar, bits, tail = layout
            data = write(samples, bits, photometric, planar=planar, more=more)
            return Case(f"{name} {kind} {tail}", data, picture)

        four = ramp(ROWS, COLUMNS, 4, bits)
        rgb, shown = four[:, :, :3], eight(four, bits)
        color, alpha = shown[:, :, :3], shown[:, :, 3:]
        yield case(f"rgb{bits}", rgb, 2, color)
        yield case(f"rgb{bits}+alpha", four, 2, on_white(color, alpha), 2)
        yield case(f"rgb{bits}+unspecified", four, 2, color, 0)
        if not planar:
            yield case(f"rgb{bits}+undeclared", four, 2, on_white(color, alpha))
        yield case(
            f"rgb{bits}+alpha zero", np.dstack([rgb, 0 * four[:, :, 3]]), 2, 0 * color + 255, 2
        )
        yield case(f"rgb{bits}+undeclared zero", np.dstack([rgb, 0 * four[:, :, 3]]), 2, color)
        product = rgb.astype(np.uint64) * four[:, :, 3:] // (2**bits - 1)
        product = np.dstack([product, four[:, :, 3]]).astype(np.uint32)
        picture = eight(product[:, :, :3], bits) + 255 - alpha
        yield case(f"rgb{bits}+associated", product, 2, picture, 1)
        yield case(f"cmyk{bits}", four, 5, (255 - color) * (255 - alpha) / 255)
    for planar in (False, True):
        tail = "planes" if planar else "pixels"
        y, cb, cr = np.moveaxis(ramp(ROWS, COLUMNS, 3, 8).astype(np.float64), 2, 0)
        # ITU-R BT.601, as JFIF has it
        picture = np.dstack([
            y + 1.402 * (cr - 128),
            y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
            y + 1.772 * (cb - 128),
        ]).clip(0, 255)  # fmt: skip
        three = ramp(ROWS, COLUMNS, 3, 8)
        data = write(three, 8, 6, planar=planar, more=[(530, 3, [1, 1])])
        yield Case(f"{name} YCbCr {tail}", data, picture)
        # Near grey: at the edge of what sRGB can show decoders cut it in different ways.
        lab = (three % 20 + np.array([200, 246, 246], np.uint32)) % 256
        yield Case(f"{name} Lab {tail}", write(lab, 8, 8, planar=planar), _from_lab(lab))
        data = write(three, 16, 32845, planar=planar)
        yield Case(f"{name} LogLuv {tail}", data, np.zeros((1, 1, 1)))


def _from_lab(samples: Samples) -> Picture:
    """CIE's L*a*b* of 1976 to sRGB; the matrix is Lindbloom's, adapted to D65."""
    lightness, a, b = np.moveaxis(samples.astype(np.float64), 2, 0)
    f = (lightness * 100 / 255 + 16) / 116
    f = np.dstack([f + ((a + 128) % 256 - 128) / 500, f, f - ((b + 128) % 256 - 128) / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (xyz @ np.array(matrix).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _tiff_layouts(order: str) -> Iterator[Case]:
    name = f"tiff {'II' if order == '<' else 'MM'}"
    layouts: dict[str, dict[str, Any]] = {
        "tiled": {"tile": 16},
        "tiled deflate": {"tile": 16, "compression": 8},
        "predicted": {"compression": 8, "predictor": 2},
        "big": {"big": True},
    }
    for (layout, options), bits in itertools.product(layouts.items(), (8, 16)):
        for channels, photometric in ((1, 0), (1, 1), (3, 2)):
            samples = ramp(ROWS, COLUMNS, channels, bits)
            picture = eight(samples, bits)
            data = tiff(samples, bits, photometric, order=order, **options)
            picture = picture if photometric else 255 - picture
            yield Case(f"{name} {layout} {photometric} {bits}", data, picture)
    for bits, photometric in itertools.product((1, 2, 4, 8, 16), (0, 1)):
        grey = ramp(ROWS, COLUMNS, 1, bits)
        data = tiff(grey, bits, photometric, order=order, fill_order=2)
        picture = eight(grey, bits) if photometric else 255 - eight(grey, bits)
        yield Case(f"{name} fill grey{bits} {photometric}", data, picture)


RGBX, XRGB = (0xFF0000, 0xFF00, 0xFF), (0xFF000000, 0xFF0000, 0xFF00)
BIT_FIELDS = {
    "5-6-5": (16, (0xF800, 0x7E0, 0x1F)),
    "5-5-5": (16, (0x7C00, 0x3E0, 0x1F)),
    "1-5-5-5": (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    "4-4-4-4": (16, (0xF00, 0xF0, 0xF, 0xF000)),
    "RGBX": (32, RGBX),
    "XRGB": (32, XRGB),
    "BGRX": (32, (0xFF, 0xFF00, 0xFF0000)),
    "10-10-10": (32, (0x3FF00000, 0xFFC00, 0x3FF)),
    "RGBA": (32, (*RGBX, 0xFF000000)),
    "ARGB": (32, (*XRGB, 0xFF)),
    "BGRA": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
}


def bmp_cases() -> Iterator[Case]:
    for header, top_down in itertools.product((12, 40, 52, 56, 64, 108, 124), (False, True)):
        if header == 12 and top_down:
            continue
        name = f"bmp {header}{' top down' if top_down else ''}"

        def write(*args: Any, header: int = header, top_down: bool = top_down, **kw: Any) -> bytes:
            return bmp(*args, header=header, top_down=top_down, **kw)

        for bits in (1, 4, 8):
            for kind, palette in _palettes(bits, of_any_length=header > 12).items():
                indices = ramp(ROWS, COLUMNS, 1, bits)[:, :, 0] % len(palette)
                data = write(indices, bits, palette=[tuple(color) for color in palette])
                yield Case(f"{name} {bits} bits, {kind}", data, np.array(palette)[indices])
        for bits, masks in ((16, (0x7C00, 0x3E0, 0x1F)), (24, RGBX), (32, RGBX)):
            pixels = ramp(ROWS, COLUMNS, 1, bits)[:, :, 0]
            yield Case(f"{name} {bits} bits", write(pixels, bits), _fields(pixels, masks))
        if header in (12, 64):
            continue
        for kind, (bits, masks) in BIT_FIELDS.items():
            if len(masks) == 4 and header < 56:
                continue
            pixels = ramp(ROWS, COLUMNS, 1, bits)[:, :, 0]
            picture = _fields(pixels, masks)
            yield Case(f"{name} {kind}", write(pixels, bits, masks=masks), picture)
            if len(masks) == 4 and bits == 32:
                pixels &= np.uint32(~masks[3] & 0xFFFFFFFF)
                data = write(pixels, bits, masks=masks)
                yield Case(f"{name} {kind} all clear", data, _fields(pixels, masks[:3]))
                pixels[4, 4] |= np.uint32(masks[3] & 0x05050505)
                data = write(pixels, bits, masks=masks)
                yield Case(f"{name} {kind} nearly all clear", data, _fields(pixels, masks))


def _palettes(bits: int, *, of_any_length: bool) -> dict[str, list[list[int]]]:
    full = 2**bits
    found = {"full": colors(full).tolist()}
    if of_any_length:
        found |= {
            "two": colors(2).tolist(),
            "black and white": [[0] * 3, [255] * 3],
            "white and black": [[255] * 3, [0] * 3],
            "one": [[9, 8, 7]],
            "greys": [[255 * i // (full - 1)] * 3 for i in range(full)],
        }
    if of_any_length and bits > 1:
        found |= {"three": colors(3).tolist(), "three blacks": [[i] * 3 for i in range(3)]}
    if of_any_length and bits == 4:
        found["sixteen blacks"] = [[i] * 3 for i in range(16)]
    return found


def _fields(pixels: Samples, masks: tuple[int, ...]) -> Picture:
    channels = [
        ((pixels & np.uint32(mask)) >> ((mask & -mask).bit_length() - 1)) * 255.0
        / (mask >> ((mask & -mask).bit_length() - 1))
        for mask in masks
    ]  # fmt: skip
    color = np.dstack(channels[:3])
    return on_white(color, channels[3][:, :, None]) if len(masks) == 4 else color


def gif_cases() -> Iterator[Case]:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "local": {"local": True},
        "interlaced": {"interlaced": True},
        "transparent": {"transparent": 1},
        "background": {"background": 1},
        "disposed": {"disposal": 2, "transparent": 1},
        "undone": {"disposal": 3},
        "without a trailer": {"trailer": b""},
    }
    for bits, grey in itertools.product((1, 2, 4, 8), (False, True)):
        full = 2**bits
        palette = np.array([[i] * 3 for i in range(full)]) if grey else colors(full)
        indices = ramp(ROWS, COLUMNS, 1, bits)[:, :, 0]
        for kind, options in kinds.items():
            shown = palette[indices]
            if "transparent" in options:
                shown = np.where(indices[:, :, None] == 1, 255, shown)
            name = f"gif {bits}{' grey' if grey else ''}"
            yield Case(f"{name} {kind}", gif(indices, palette.tolist(), **options), shown)
            around = np.full((30, 40, 3), 255)
            around[6 : 6 + ROWS, 9 : 9 + COLUMNS] = shown
            data = gif(indices, palette.tolist(), canvas=(40, 30), at=(9, 6), **options)
            yield Case(f"{name} small {kind}", data, around)


CASES = {"png": png_cases, "tiff": tiff_cases, "bmp": bmp_cases, "gif": gif_cases}


def reason(table: dict[str, str], name: str) -> str | None:
    return next((pattern for pattern in table if fnmatchcase(name, pattern)), None)


def ours(data: bytes) -> Picture:
    return np.asarray(decode_image(data, max_megapixels=50)).astype(np.float64)


def theirs(data: bytes) -> Picture:
    image = pyvips.Image.new_from_buffer(data, "")
    if image.hasalpha():
        image = image.flatten(background=[255 if image.format == "uchar" else 65535])
    pixels = image.colourspace("srgb").cast("uchar").numpy()
    return pixels.reshape(*pixels.shape[:2], -1).astype(np.float64)


def off(one: Picture, other: Picture) -> float:
    """By how many levels two pictures differ at most."""
    if one.shape[:2] != other.shape[:2]:
        return 255
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("kind", CASES)
def test_a_picture_is_what_was_written(kind: str):
    wrong = []
    for case in CASES[kind]():
        try:
            levels = off(ours(case.data), case.picture)
        except BadRequest:
            if reason(REFUSED, case.name) is None:
                wrong.append(f"{case.name}: refused")
            continue
        if reason(REFUSED, case.name):
            wrong.append(f"{case.name}: no longer refused")
        elif (levels > WITHIN) != (reason(OTHERWISE, case.name) is not None):
            wrong.append(f"{case.name}: {levels:.0f} levels off")
    assert wrong == []


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "bmp"])
def test_libvips_sees_the_same(kind: str):
    wrong = []
    for case in CASES[kind]():
        if not any(reason(table, case.name) for table in (REFUSED, OTHERWISE, NOT_VIPS)):
            levels = off(ours(case.data), theirs(case.data))
            if levels > WITHIN:
                wrong.append(f"{case.name}: {levels:.0f} levels off")
    assert wrong == []


def test_every_reason_has_its_case():
    names = [case.name for cases in CASES.values() for case in cases()]
    assert len(set(names)) == len(names) > 1000
    for pattern in (*REFUSED, *OTHERWISE, *NOT_VIPS):
        assert any(fnmatchcase(name, pattern) for name in names), pattern


@pytest.mark.slow  # its kinds of files are all among ours
def test_the_bmp_suite(pytestconfig: pytest.Config):
    """Jason Summers' good files, of which Pillow's source has some, and how they should look."""
    files = {name: data for name, data in pillow_images(pytestconfig) if name.startswith("bmp/")}
    compared = 0
    for name, data in files.items():
        reference = files.get(name.replace("bmp/g/", "bmp/html/").replace(".bmp", ".png"))
        if name.startswith("bmp/g/") and reference is not None:
            assert off(ours(data), theirs(reference)) <= WITHIN, name
            compared += 1
    assert compared >= 8
