"""An RGB image to the vision tower's patches, as the checkpoint's image processor would.

transformers' ``Qwen2VLImageProcessorPil`` gives the same to the last bit but one, for a picture
that needs no resizing. But it copies a picture seven times on the way, and a 12-megapixel photo
then takes five times as long, 1.4 s more on one core: longer than all else before its first token.

Resizing is torchvision's, which the checkpoints were made and published with: columns first.
Pillow picks the cheaper order, and since each of the two passes cuts off at black and white, sharp
edges then differ by up to 23 of 255 levels (``tests/parity.py``); so it is asked twice.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as Images
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qwenvl_app.errors import ModelLoadError

if TYPE_CHECKING:
    from PIL.Image import Image

Grid = tuple[int, int, int]  # patches: time, rows, columns


def pixel_limits(processor: Any) -> tuple[int, int]:
    """The least and the most pixels of a resized picture, as ``processor`` takes them.

    Its configuration may have them in two places under three names, and the processor alone knows
    which counts. Raises ModelLoadError.
    """
    size: dict[str, Any] = dict(processor.size)
    least, most = (size.get(name, 0) for name in ("shortest_edge", "longest_edge"))
    if not all(isinstance(each, int | float) and each >= 1 for each in (least, most)):
        raise ModelLoadError(
            "preprocessor_config.json has no size with shortest_edge and longest_edge, both "
            "numbers above 0; take the checkpoint's own"
        )
    return int(least), int(most)


class Patcher:
    """What ``processor``, a Qwen2VLImageProcessorPil, says, applied. Any thread.

    Raises ModelLoadError for a processor that does not resize, rescale and normalise.
    """

    def __init__(self, processor: Any):
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not getattr(processor, step):
                raise ModelLoadError(f"preprocessor_config.json has {step} off; it must be on")
        self.processor = processor
        self.side, self.merge = processor.patch_size, processor.merge_size
        self._least, self._most = pixel_limits(processor)
        self._resample = Images.Resampling(processor.resample)
        # (value * factor - mean) / std, as one product and one sum a channel.
        mean, std = (
            np.asarray(values, np.float32).reshape(3, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )
        self._scale, self._shift = np.float32(processor.rescale_factor) / std, -mean / std

    def within(self, least: int | None, most: int | None) -> Patcher:
        """One that scales pictures to at least and at most so many pixels.

        Never to more than the checkpoint says: memory is planned for that.
        """
        if least is None and most is None:
            return self
        other = copy.copy(self)
        other._most = min(most or self._most, self._most)
        other._least = min(self._least if least is None else least, other._most)
        return other

    def grid(self, image: Image) -> Grid:
        """Patches that ``image`` will have. Nothing is computed for it."""
        height, width = smart_resize(
            image.height,
            image.width,
            self.side * self.merge,
            min_pixels=self._least,
            max_pixels=self._most,
        )
        return 1, height // self.side, width // self.side

    def resized(self, image: Image) -> Image:
        """``image`` in the size that is cut into patches: the same object if it has it already."""
        _, rows, columns = self.grid(image)
        for size in ((columns * self.side, image.height), (columns * self.side, rows * self.side)):
            if image.size != size:
                image = image.resize(size, self._resample)
        return image

    def patches(self, image: Image) -> torch.Tensor:
        """Float32 (patches, 3, side, side), on the CPU: those that are merged, side by side.

        The tower wants two frames; a still picture is twice the same, which is left to it.
        """
        side, merge = self.side, self.merge
        _, rows, columns = self.grid(image)
        blocks = np.asarray(self.resized(image)).reshape(
            rows // merge, merge, side, columns // merge, merge, side, 3
        )
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
        pixels = np.empty(blocks.shape, np.float32)
        np.multiply(blocks, self._scale, out=pixels)
        pixels += self._shift
        return torch.from_numpy(pixels.reshape(-1, 3, side, side))
