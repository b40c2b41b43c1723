"""What transformers' own processor makes of some pictures and prompts, recorded once.

``Qwen3VLProcessor`` needs torchvision, which this project does without; so it ran once, in an
environment of its own, and what it gave is in ``tests/data/parity.npz``. To record it again:

    python3.11 -m venv /tmp/tv && /tmp/tv/bin/pip install torch==2.14.1 torchvision==0.29.1 \\
        transformers==5.23.0 accelerate==1.15.0 pillow==13.0.0
    /tmp/tv/bin/python -m tests.parity
"""

from __future__ import annotations

import json
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RECORDED = Path(__file__).parent / "data" / "parity.npz"
_SAMPLES = 3000  # of a picture's values

# (kind, width, height): the least and the most that is allowed, just beside it, very long, a
# phone's photo, a screen's, and what is larger than the model takes.
PICTURES = (
    *(("flat", 1, 1), ("noise", 2, 1), ("noise", 31, 33), ("lines", 64, 64), ("noise", 256, 256)),
    *(("photo", 257, 255), ("gradient", 255, 257), ("lines", 1, 200), ("lines", 200, 1)),
    *(("gradient", 3000, 15), ("lines", 40, 4000), ("photo", 640, 480), ("noise", 333, 777)),
    *(("noise", 408, 648), ("lines", 471, 679), ("photo", 338, 461)),
    *(("photo", 1179, 2556), ("lines", 1920, 1080), ("photo", 4000, 3000), ("photo", 5000, 3700)),
)
PROMPTS = (
    "这张图里有什么？",
    "What's in the picture?  Count to 2026.",
    " leading, trailing \n\n",
    "🎉👩‍👩‍👧 é e\u0301 ﷺ 日本語 ไทย",
    "def f(x):\n\treturn x ** 2  # 数学 ∑",
    "x" * 300,
)


def picture(kind: str, width: int, height: int) -> Image.Image:
    """The same on every machine: made by whole numbers and Pillow alone."""
    rng = np.random.default_rng((width, height))
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    channel = np.arange(3)[None, None, :]
    if kind == "flat":
        pixels = np.full((height, width, 3), (200, 30, 90))
    elif kind == "noise":
        pixels = rng.integers(0, 256, (height, width, 3))
    elif kind == "gradient":
        pixels = (x * 255 // max(1, width - 1) + (y + 1) * channel) % 256 + 0 * y
    elif kind == "lines":  # as sharp as text
        pixels = ((x // 3 + y // 5 + channel) % 2) * 255
    else:
        coarse = rng.integers(0, 256, (23, 31, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.integers(-12, 13, (64, 64, 3))
        grain = np.tile(grain, (height // 64 + 1, width // 64 + 1, 1))[:height, :width]
        pixels = np.clip(np.asarray(smooth, np.int16) + grain, 0, 255)
    return Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))


def levels(pixels: np.ndarray) -> np.ndarray:
    """Normalised values as what they came from: 0 to 255, since mean and deviation are 0.5."""
    return np.rint((pixels.ravel() + 1) * 127.5).astype(np.uint8)


def sampled(flat: np.ndarray) -> np.ndarray:
    """Some values of a picture, always at the same places."""
    places = np.random.default_rng(0).integers(0, len(flat), _SAMPLES)
    return flat[places]


def runs(ids: list[int]) -> list[list[int]]:
    """Token ids as (id, how often): a picture's are thousands."""
    return [[token, len(list(same))] for token, same in groupby(ids)]


def record() -> None:
    """Run transformers' processor, with torchvision."""
    from transformers import Qwen3VLProcessor

    from tests.real_shape import make

    with tempfile.TemporaryDirectory() as directory:
        processor: Any = Qwen3VLProcessor.from_pretrained(make(Path(directory)))
    kind = type(processor.image_processor).__name__
    assert "Pil" not in kind, kind
    grids, values = [], []
    for case in PICTURES:
        made = processor.image_processor(images=[picture(*case)], return_tensors="np")
        grids.append(made["image_grid_thw"][0])
        patches = made["pixel_values"].reshape(-1, 3, 2, 16, 16)
        assert (patches[:, :, 0] == patches[:, :, 1]).all()
        values.append(sampled(levels(patches[:, :, 0])))
    prompts = []
    for text in PROMPTS:
        content = [{"type": "image", "image": picture("photo", 640, 480)}]
        content.append({"type": "text", "text": text})  # type: ignore[dict-item]
        made = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
        )
        prompts.append(runs(list(made["input_ids"][0])))
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        RECORDED, grids=np.stack(grids), values=np.stack(values), prompts=json.dumps(prompts)
    )
    print(f"{kind}: {RECORDED.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    record()
