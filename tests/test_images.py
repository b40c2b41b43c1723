"""Pictures as a viewer would show them, whatever the format and mode."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwenvl_app.errors import BadRequest, TooLarge
from qwenvl_app.images.decode import decode_image
from tests.picture_writers import bmp, gif, png, tiff
from tests.pictures import MB, chunk, exif, packed_text, png_with, small_webp
from tests.wire import encode, picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def decode(data: bytes) -> Image.Image:
    image = decode_image(data, max_megapixels=50)
    assert image.mode == "RGB"
    return image


def close(
    image: Image.Image, at: tuple[int, int], color: tuple[int, ...], within: int = 12
) -> bool:
    return bool(np.abs(np.array(image.getpixel(at)) - np.array(color)).max() <= within)


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "MPO"]
)
def test_formats(file_format: str):
    image = decode(picture("rectangle", "red", (96, 64), file_format))
    assert image.size == (96, 64)
    assert close(image, (48, 30), RED, 30)
    assert close(image, (3, 3), (250, 245, 240), 12)


def test_the_format_is_told_by_content():
    """Only what is on the list is read, whatever else Pillow can open."""
    for file_format in ("PPM", "ICO", "TGA", "PCX", "EPS", "PDF"):
        with pytest.raises(BadRequest):
            decode(picture(file_format=file_format))
    with pytest.raises(BadRequest):
        decode(b'<svg xmlns="http://www.w3.org/2000/svg"/>')


# Where the file's top left pixel belongs, for each EXIF orientation.
_CORNERS = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_exif_orientation(orientation: int, file_format: str):
    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).rectangle([0, 0, 31, 31], fill="red")
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode(encode(image, file_format, exif=exif.tobytes()))
    assert shown.size == ((64, 96) if orientation >= 5 else (96, 64))
    right, bottom = shown.width - 9, shown.height - 9
    at = {"tl": (8, 8), "tr": (right, 8), "br": (right, bottom), "bl": (8, bottom)}
    for corner, place in at.items():
        assert close(shown, place, RED if corner == _CORNERS[orientation] else WHITE, 40)


def transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle([10, 0, 19, 19], fill=(255, 0, 0, 255))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_transparency_is_laid_on_white(file_format: str):
    image = decode(encode(transparent("RGBA"), file_format))
    assert close(image, (2, 10), WHITE)
    assert close(image, (17, 10), RED)


def test_half_transparency_is_mixed_with_white():
    image = decode(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 128))))
    assert close(image, (1, 1), (255, 127, 127), 1)


def test_grey_with_alpha():
    image = Image.new("LA", (4, 4), (0, 0))
    image.putpixel((1, 1), (0, 255))
    shown = decode(encode(image))
    assert (shown.getpixel((0, 0)), shown.getpixel((1, 1))) == (WHITE, (0, 0, 0))


def test_a_transparent_palette_entry_and_colour():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    shown = decode(encode(palette, transparency=0))
    assert (shown.getpixel((0, 0)), shown.getpixel((1, 1))) == (WHITE, RED)
    plain = Image.new("RGB", (4, 4), (0, 255, 0))
    plain.putpixel((1, 1), RED)
    shown = decode(encode(plain, transparency=(0, 255, 0)))
    assert (shown.getpixel((0, 0)), shown.getpixel((1, 1))) == (WHITE, RED)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey(file_format: str):
    """Pillow alone would clip everything above 255 to white."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (4, 1)))
    shown = np.asarray(decode(encode(image, file_format)))
    assert np.abs(shown[0, :, 0].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_are_stretched(kind):
    values = np.tile(np.linspace(-1000, 1000, 64).astype(kind), (4, 1))
    shown = np.asarray(decode(encode(Image.fromarray(values), "TIFF")))
    assert (shown[0, 0, 0], shown[0, -1, 0]) == (0, 255)
    flat = Image.fromarray(np.full((4, 4), 7, dtype=kind))
    assert decode(encode(flat, "TIFF")).size == (4, 4)


def test_sixteen_bits_of_colour():
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    row = b"\0" + struct.pack(">3H", 65535, 32768, 0) * 4
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    assert close(decode(data), (1, 1), (255, 128, 0), 1)


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk(file_format: str):
    image = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert close(decode(encode(image, file_format)), (10, 10), RED)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_bilevel_grey_and_palette(mode: str):
    image = Image.new("RGB", (32, 32), "black")
    ImageDraw.Draw(image).rectangle([16, 0, 31, 31], fill="white")
    shown = decode(encode(image.convert(mode)))
    assert close(shown, (2, 2), (0, 0, 0))
    assert close(shown, (30, 2), WHITE)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_an_animation(file_format: str):
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, BLUE)]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert close(decode(data), (10, 10), RED, 20)


def test_a_colour_profile_is_dropped():
    """With and without one, the same pixels: what the checkpoints were trained on."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = Image.open(io.BytesIO(picture()))
    assert decode(encode(plain, icc_profile=profile)).tobytes() == decode(picture()).tobytes()
    assert decode(encode(plain, icc_profile=b"broken")).tobytes() == decode(picture()).tobytes()


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"]
)
def test_truncated_files(file_format: str):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    for share in (0.05, 0.3, 0.6):
        with pytest.raises(BadRequest, match="无法作为图片读取"):
            decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(("size", "fits"), [((200, 1), True), ((201, 1), False), ((1, 201), False)])
def test_ratio(size: tuple[int, int], fits: bool):
    data = picture(size=size)
    if fits:
        assert decode(data).size == size
    else:
        with pytest.raises(
            BadRequest, match=f"长宽比不能超过 200，但收到的图片为 {size[0]}×{size[1]} 像素"
        ):
            decode(data)


def test_one_pixel():
    assert decode(encode(Image.new("RGB", (1, 1), RED))).getpixel((0, 0)) == RED


@pytest.mark.parametrize("side", [8000, 30_000])
def test_pixels_are_counted_before_decoding(side: int):
    """A header of 65 bytes that claims 900 megapixels costs nothing."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    data += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 0) + b"IDAT"
    with pytest.raises(TooLarge, match="50 百万像素的限制"):
        decode(data)


def test_what_a_decoder_says_stays_here():
    with pytest.raises(BadRequest) as error:
        decode(picture()[:60])
    assert error.value.__cause__ is None
    assert "0x" not in str(error.value)


def test_what_is_returned_holds_no_file_and_no_decoder():
    """A WebP's decoder keeps two canvases, as much again as the picture twice."""
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF"):
        assert type(decode(picture(file_format=file_format))) is Image.Image


def test_numbers_that_are_none():
    values = np.tile(np.linspace(0, 100, 64, dtype=np.float32), (4, 1))
    values[0, :3] = (np.nan, np.inf, -np.inf)
    shown = np.asarray(decode(encode(Image.fromarray(values), "TIFF")))
    assert (shown[1, 0, 0], shown[1, -1, 0]) == (0, 255)
    ends = np.array([[np.finfo(np.float32).min, np.finfo(np.float32).max]])
    shown = np.asarray(decode(encode(Image.fromarray(ends.astype(np.float32)), "TIFF")))
    assert list(shown[0, :, 0]) == [0, 255]


@pytest.mark.parametrize(
    "exif", [b"", b"nonsense", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*" + bytes(2**20)]
)
def test_exif_that_cannot_be_read_counts_as_none(exif: bytes):
    """A viewer shows the picture all the same; it was refused here."""
    from tests.pictures import chunk, png_with

    assert decode(png_with(chunk(b"eXIf", exif))).tobytes() == decode(picture()).tobytes()


def test_a_run_length_bmp():
    """Decoded in Python: small ones are read, one of 49 megapixels took three seconds."""
    from tests.pictures import bmp_runs

    assert decode(bmp_runs(255, 20)).size == (255, 20)
    with pytest.raises(BadRequest):
        decode(bmp_runs(255 * 9, 2000))


def test_pillow_has_nothing_to_say_in_the_log():
    """Its warnings are of a client's file, one line for each, and Python remembers them all."""
    code = (
        "import io, logging\n"
        "from qwenvl_app.images.decode import decode_image\n"
        "from tests.pictures import chunk, png_with, tiff\n"
        "logging.basicConfig()\n"
        "decode_image(png_with(chunk(b'acTL', bytes(8))), max_megapixels=1)\n"
        "try: decode_image(tiff((277, 4, 1, b'\\xff\\0\\0\\0')), max_megapixels=1)\n"
        "except Exception: pass\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("header", [56, 108, 124])
def test_an_alpha_of_nothing_is_none_in_a_bmp(header: int):
    """The byte was reserved for long, and writers leave it 0: the picture was all white."""
    red = np.full((4, 4), 0xFF0000, np.uint32)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    assert decode(bmp(red, 32, header=header, masks=masks)).getpixel((1, 1)) == RED
    assert decode(bmp(red, 32, header=header)).getpixel((1, 1)) == RED
    red[3, 3] |= 0xFF000000  # one pixel that is there, and the others are not
    shown = decode(bmp(red, 32, header=header, masks=masks))
    assert (shown.getpixel((1, 1)), shown.getpixel((3, 3))) == (WHITE, RED)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_an_alpha_of_nothing_is_transparent_where_alpha_is_declared(file_format: str):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encode(image, file_format)).getpixel((1, 1)) == WHITE


def test_a_tiff_that_does_not_declare_its_fourth_sample():
    red = np.zeros((4, 4, 4), np.uint32)
    red[:, :, 0] = 255
    assert decode(tiff(red, 8, 2)).getpixel((1, 1)) == RED
    assert decode(tiff(red, 8, 2, more=[(338, 3, [2])])).getpixel((1, 1)) == WHITE


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_white_is_zero(order: str, bits: int):
    """16 bits came out inverted, or not at all."""
    samples = np.array([[[0], [2**bits - 1]]], np.uint32)
    for compression in (1, 8):
        shown = decode(tiff(samples, bits, 0, order=order, compression=compression))
        assert (shown.getpixel((0, 0)), shown.getpixel((1, 0))) == (WHITE, (0, 0, 0))


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_transparent_colour_of_sixteen_bits(interlaced: bool):
    """All 16 count: 0x1234 is transparent, 0x1235 is another colour that looks the same."""
    grey = np.full((9, 9, 1), 0x1235, np.uint32)
    grey[4, 4] = 0x1234
    before = chunk(b"tRNS", b"\x12\x34")
    shown = decode(png(grey, 16, 0, before=before, interlaced=interlaced))
    assert (shown.getpixel((0, 0)), shown.getpixel((4, 4))) == ((0x12,) * 3, WHITE)
    color = np.full((9, 9, 3), 0x1235, np.uint32)
    color[4, 4] = 0x1234
    before = chunk(b"tRNS", b"\x12\x34" * 3)
    shown = decode(png(color, 16, 2, before=before, interlaced=interlaced))
    assert (shown.getpixel((0, 0)), shown.getpixel((4, 4))) == ((0x12,) * 3, WHITE)


def test_a_transparent_grey_of_four_bits():
    """Pillow stretches the samples to 8 bits, and not the transparent one."""
    grey = np.full((4, 4, 1), 7, np.uint32)
    assert decode(png(grey, 4, 0, before=chunk(b"tRNS", b"\0\7"))).getpixel((1, 1)) == WHITE


def test_a_gif_that_is_smaller_than_its_canvas():
    """A browser shows nothing around it, whatever the file calls its background."""
    frame = np.ones((4, 4), np.uint32)
    for options in ({}, {"background": 1}, {"transparent": 0}):
        data = gif(frame, [(0, 0, 0), RED], canvas=(16, 16), at=(8, 8), **options)
        shown = decode(data)
        assert shown.size == (16, 16)
        assert (shown.getpixel((2, 2)), shown.getpixel((9, 9))) == (WHITE, RED)


def test_an_animated_webp_whose_first_frame_is_smaller_than_its_canvas():
    """Only the second has transparency, or none: Pillow showed black around the first."""
    shown = decode(small_webp(Image.new("RGB", (16, 16), RED), (40, 30)))
    assert shown.size == (40, 30)
    assert close(shown, (30, 20), WHITE)
    assert close(shown, (8, 8), RED)


def test_a_palette_of_black_and_white_does_not_make_one_bit():
    """Pillow thought so, and read eight pixels from each."""
    indices = np.array([[0, 1] * 8] * 16, np.uint32)
    for bits in (4, 8):
        shown = decode(bmp(indices, bits, palette=[(0, 0, 0), WHITE]))
        assert np.asarray(shown)[:, :, 0].tolist() == (indices * 255).tolist()


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt"])
@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "behind them"])
def test_a_large_text_or_profile_in_a_png(kind: str, place: int):
    """ComfyUI's pictures carry their workflow; Pillow refuses a megabyte of packed text."""
    data = picture()
    data = data[:place] + packed_text(kind, 3 * MB) + data[place:]
    assert decode(data).tobytes() == decode(picture()).tobytes()


@pytest.mark.parametrize("kind", [b"tEXt", b"pHYs", b"iCCP", b"eXIf", b"tRNS", b"acTL", b"fcTL"])
@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "behind them"])
def test_a_damaged_chunk_that_a_png_can_do_without(kind: bytes, place: int):
    damaged = chunk(kind, bytes(26))[:-1] + b"?"
    data = picture()
    shown = decode(data[:place] + damaged + data[place:])
    assert shown.tobytes() == decode(picture()).tobytes()


@pytest.mark.parametrize("kind", [b"PLTE", b"ABCD"])
def test_a_damaged_chunk_that_a_png_needs(kind: bytes):
    with pytest.raises(BadRequest):
        decode(png_with(chunk(kind, bytes(3))[:-1] + b"?"))


def test_the_orientation_behind_the_pixels_of_a_png():
    data = picture(size=(96, 64))
    rotated = data[:-12] + chunk(b"eXIf", exif(6)) + data[-12:]
    assert decode(rotated).size == (64, 96)


_JPEGS: dict[str, dict[str, object]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "many restarts": {"restart_marker_blocks": 3},
    "progressive with restarts": {"progressive": True, "restart_marker_blocks": 5},
    "full colour": {"subsampling": 0},
}


@pytest.mark.parametrize("kind", _JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_lacks_its_end(kind: str, mode: str):
    """Its last marker and no more: libjpeg would make up all that is missing, without a word."""
    grain = np.random.default_rng(2).bytes(67 * 91 * len(mode))
    data = encode(Image.frombytes(mode, (91, 67), grain), "JPEG", **_JPEGS[kind])
    whole = decode(data).tobytes()
    for short in (data[:-2], data[:-1], data[:-2] + b"\xff\xff", data[:-2] + bytes(100)):
        assert decode(short).tobytes() == whole
    cuts = [*range(3, 40), *range(40, len(data) - 700, 97)]
    for cut in cuts:
        for tail in (b"", bytes(200)):
            with pytest.raises(BadRequest):
                decode(data[:-cut] + tail)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", _JPEGS)
def test_a_cut_jpeg_is_the_same_picture_or_none(kind: str, step: int):
    """Of a picture as plain as this a few bytes may be missing and nothing with them."""
    data = picture(size=(131, 97))
    data = encode(Image.open(io.BytesIO(data)), "JPEG", **_JPEGS[kind])
    whole = decode(data).tobytes()
    refused = 0
    cuts = [*range(1, 50), *range(50, len(data), step)]
    for cut in cuts:
        try:
            assert decode(data[:-cut]).tobytes() == whole, cut
        except BadRequest:
            refused += 1
    assert refused > 0.9 * len(cuts)


def test_a_progressive_jpeg_that_lacks_whole_scans():
    """Each of the others is all there: only their headers tell."""
    grain = np.random.default_rng(2).integers(0, 256, (67, 91, 3), dtype=np.uint8)
    data = encode(Image.fromarray(grain), "JPEG", progressive=True)
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    tables = [data.rindex(b"\xff\xc4", 0, at) for at in starts[1:]]
    assert len(tables) >= 8
    for at in tables:
        with pytest.raises(BadRequest):
            decode(data[:at])


@pytest.mark.parametrize("mode", ["1", "P", "L", "RGB"])
def test_a_gif_that_lacks_its_trailer(mode: str):
    data = encode(Image.open(io.BytesIO(picture())).convert(mode), "GIF")
    assert decode(data[:-1]).tobytes() == decode(data).tobytes()


def test_a_png_that_lacks_its_end():
    """Its last chunk, or more of it, but none of its pixels."""
    whole = decode(picture()).tobytes()
    for cut in range(1, 17):
        assert decode(picture()[:-cut]).tobytes() == whole
    assert decode(picture()[:-12] + b"\0\0\1\0IDAT").tobytes() == whole
    with pytest.raises(BadRequest):
        decode(picture()[:-40])
