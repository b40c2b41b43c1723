"""Pictures of one coloured shape on a pale background, drawn the way easy-VQA draws its own.

The package ships 4,000 training pictures; a model that is to be right 99.8 % of the time wants
far more, so most training pictures are drawn here: same three shapes, same eight colours, sizes of
1/8 to 1/2 of the shorter side, anywhere inside the frame. Facts read off the generator of
https://github.com/vzhou842/easy-VQA (gen_data/); the code is our own.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "rectangle", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``shape`` is None for a picture with no shape that the model knows.

    ``box`` is (left, top, right, bottom) in fractions of width and height.
    """

    shape: str | None
    color: str | None
    box: tuple[float, float, float, float] | None


def draw(
    rng: random.Random, width: int, height: int, *, largest: float = 1 / 2
) -> tuple[Image.Image, Scene]:
    """Draw one random shape; antialiased by drawing at twice the size and halving.

    Its sides are 1/8 to ``largest`` of the picture's shorter side. Returns an RGB image of
    ``width`` x ``height`` pixels and what it shows.
    """
    width, height = 2 * width, 2 * height
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    image = Image.new("RGB", (width, height), _pale(rng))
    shorter = min(width, height)
    size = rng.uniform(shorter / 8, shorter * largest)
    w, h = size, size
    if shape == "rectangle":
        h = rng.uniform(shorter / 8, shorter * largest)
    elif shape == "triangle":  # equilateral, pointing up
        h = size * math.sin(math.pi / 3)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    x, y, w, h = (int(v) for v in (x, y, w, h))
    pen, fill = ImageDraw.Draw(image), COLORS[color]
    if shape == "circle":
        pen.ellipse([x, y, x + w, y + h], fill=fill)
    elif shape == "rectangle":
        pen.rectangle([x, y, x + w, y + h], fill=fill)
    else:
        pen.polygon([(x, y + h), (x + w, y + h), (x + w / 2, y)], fill=fill)
    scene = Scene(shape, color, (x / width, y / height, (x + w) / width, (y + h) / height))
    return image.resize((width // 2, height // 2), Image.Resampling.BILINEAR), scene


def draw_other(rng: random.Random, width: int, height: int) -> tuple[Image.Image, Scene]:
    """Draw something that is not one shape on a pale background, so that the model can say so."""
    kind = rng.randrange(5)
    seeded = np.random.default_rng(rng.getrandbits(32))
    if kind == 0:  # nothing at all
        image = Image.new("RGB", (width, height), _pale(rng))
    elif kind == 1:  # coloured clouds, from coarse to fine: the look of an unsharp photograph
        total = np.zeros((height, width, 3))
        for cells in (2, 4, 8, 16, 32):
            coarse = seeded.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            total += np.asarray(layer, dtype=np.float64) / math.sqrt(cells)
        image = Image.fromarray((total / total.max() * 255).astype(np.uint8))
    elif kind == 2:  # noise
        grain = seeded.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(grain)
    elif kind == 3:  # lines, as of text or a drawing
        image = Image.new("RGB", (width, height), _pale(rng))
        pen = ImageDraw.Draw(image)
        for _ in range(rng.randint(8, 40)):
            ends = [rng.randrange(width), rng.randrange(height)] * 2
            ends[2] += rng.randint(-width // 4, width // 4)
            ends[3] += rng.randint(-height // 8, height // 8)
            pen.line(
                ends, fill=tuple(rng.randrange(160) for _ in range(3)), width=max(1, width // 64)
            )
    else:  # many shapes over one another
        image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        for _ in range(rng.randint(8, 40)):
            x, y = rng.randrange(-width // 4, width), rng.randrange(-height // 4, height)
            corner = [x, y, x + rng.randint(4, width // 2), y + rng.randint(4, height // 2)]
            fill = tuple(rng.randrange(256) for _ in range(3))
            (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(corner, fill=fill)
    return image, Scene(None, None, None)


def encode(image: Image.Image, file_format: str, rng: random.Random) -> bytes:
    """Encode as ``PNG``, ``JPEG``, ``WEBP`` or ``BMP``; lossy ones at a quality of 70 to 95."""
    buffer = io.BytesIO()
    options = {"quality": rng.randint(70, 95)} if file_format in ("JPEG", "WEBP") else {}
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _pale(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(230, 255) for _ in range(3))
