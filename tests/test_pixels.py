"""Patches are those of transformers' own image processors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwenvl_app.engine.pixels import Patcher
from qwenvl_app.errors import ModelLoadError
from tests import parity

CLIP = {"image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def processor(**settings) -> Qwen2VLImageProcessorPil:
    size = {"shortest_edge": 64 * 64, "longest_edge": 512 * 512}
    return Qwen2VLImageProcessorPil(**({"patch_size": 16, "size": size} | settings))


@pytest.mark.parametrize("settings", [HALF, CLIP | {"patch_size": 14}, HALF | {"resample": 2}])
@pytest.mark.parametrize(
    "size", [(64, 64), (512, 512), (1, 1), (200, 1), (3, 450), (1000, 700), (777, 333), (31, 90)]
)
def test_patches_are_those_of_the_library(settings, size):
    theirs = processor(**settings)
    ours = Patcher(theirs)
    grain = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(grain)
    grid, pixels = ours.grid(image), ours.patches(image)
    assert grid == tuple(theirs(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist())
    expected = theirs(images=[ours.resized(image)], return_tensors="pt")
    side = theirs.patch_size
    both = expected["pixel_values"].view(-1, 3, theirs.temporal_patch_size, side, side)
    assert torch.equal(both[:, :, 0], both[:, :, 1])  # a still picture is twice the same
    torch.testing.assert_close(pixels, both[:, :, 0], atol=5e-7, rtol=0)


@pytest.fixture(scope="module")
def recorded():
    with np.load(parity.RECORDED) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.slow) if width * height > 4_000_000 else number
        for number, (_, width, height) in enumerate(parity.PICTURES)
    ],
)
def test_the_same_as_the_processor_that_needs_torchvision(recorded, number):
    """It is what the published checkpoints name, and what the replaced service used.

    Both resize in 8 bits, but with weights of different precision: torchvision's have 16 bits and
    Pillow's 22. So one value in a hundred may be a level off, and two where both passes differ.
    Before ours resized columns first, as torchvision does, sharp edges were 23 levels off.
    """
    image = parity.picture(*parity.PICTURES[number])
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    ours = Patcher(Qwen2VLImageProcessorPil(patch_size=16, size=size, **HALF))
    assert ours.grid(image) == tuple(recorded["grids"][number])
    pixels = parity.sampled(parity.levels(ours.patches(image).numpy()))
    off = np.abs(pixels.astype(int) - recorded["values"][number])
    assert off.max() <= 2
    assert (off > 0).mean() <= 0.01


def test_the_grid_needs_no_pixels():
    rng, patcher = random.Random(0), Patcher(processor())
    for _ in range(50):
        image = Image.new("RGB", (rng.randint(1, 400), rng.randint(1, 400)))
        if max(image.size) <= 200 * min(image.size):
            grid = patcher.grid(image)
            assert len(patcher.patches(image)) == grid[0] * grid[1] * grid[2]


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_processor_that_leaves_a_step_out_is_refused(step):
    with pytest.raises(ModelLoadError, match=step):
        Patcher(processor(**{step: False}))
