"""Training batches: pictures through the real image processor, questions packed behind each.

All questions of a picture share its prefix: a sequence is the picture's tokens followed by every
question with its answer, each of which attends to the picture and to itself only and counts its
positions from the picture's end. For the model that is the same as one sequence per question, at
about half the work.
"""

from __future__ import annotations

import functools
import io
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import easy_vqa
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from demo.checkpoint import IMAGE_PIXELS, MERGE, PATCH
from demo.questions import (
    Question,
    chinese_question,
    english_question,
    package_question,
    stray_question,
)
from demo.scenes import COLORS, SHAPES, Scene, draw, draw_other, encode

# width : height. One shape of picture a batch, so that all its grids are alike.
_ASPECTS = ((4, 3), (3, 4), (16, 9), (9, 16), (2, 1), (1, 2))
_OTHER_SHARE, _PACKAGE_SHARE = 0.05, 0.2


class Batch(NamedTuple):
    """N pictures. Tensors of a vision batch stop at ``box``; the rest is the packed text."""

    pixels: torch.Tensor  # (N * patches, channels * temporal * patch * patch), float32
    grid: torch.Tensor  # (N, 3)
    shape: torch.Tensor  # (N,), index into SHAPES, len(SHAPES) for none, -100 for unknown
    color: torch.Tensor  # (N,), index into COLORS, -100 where there is no shape
    box: torch.Tensor  # (N, 4), NaN where there is no shape
    input_ids: torch.Tensor  # (N, L)
    labels: torch.Tensor  # (N, L), already shifted: the token to predict at each place, or -100
    position_ids: torch.Tensor  # (3, N, L)
    mask: torch.Tensor  # (N, 1, L, L), True where a token may look
    kinds: list[list[tuple[str, int, int]]]  # per picture: kind, first and last label of an answer


class Mix(NamedTuple):
    """What a stage of the training is fed with."""

    pictures: int  # a batch
    questions: int  # a picture; 0 for pictures alone
    square: float = 1 / 3  # the share of batches with square pictures, the package's among them
    small: float = 0.0  # the share of pictures with a shape of at most 2/9 of the side


class Batches(Dataset[Batch]):
    """Batch number i is a function of the seed and i, whichever process makes it."""

    def __init__(self, checkpoint: Path, seed: int, steps: int, mix: Mix):
        self._checkpoint, self._seed, self._steps, self._mix = checkpoint, seed, steps, mix

    def __len__(self) -> int:
        return self._steps

    @functools.cached_property
    def _tools(self):  # made in the process that uses them
        directory = str(self._checkpoint)
        return AutoImageProcessor.from_pretrained(directory), AutoTokenizer.from_pretrained(
            directory
        )

    def __getitem__(self, index: int) -> Batch:
        if index >= self._steps:
            raise IndexError(index)
        rng = random.Random(self._seed * 1_000_003 + index)
        mix = self._mix
        wide, high = (1, 1) if rng.random() < mix.square else rng.choice(_ASPECTS)
        target = _resized(*_random_size(rng, wide, high))
        images, scenes, asked = [], [], []
        for _ in range(mix.pictures):
            if mix.questions and (wide, high) == (1, 1) and rng.random() < _PACKAGE_SHARE:
                image, questions = rng.choice(_package_train_split())
                asked.append([rng.choice(questions) for _ in range(mix.questions)])
                scenes.append(None)
            else:
                size = _random_size(rng, wide, high)
                while _resized(*size) != target:
                    size = _random_size(rng, wide, high)
                image, scene = _random_picture(rng, *size, mix.small)
                asked.append([_random_question(rng, scene) for _ in range(mix.questions)])
                scenes.append(scene)
            images.append(image)
        processor, tokenizer = self._tools
        # One call a picture: pictures of one batch differ in size before they are resized.
        features = [processor(images=image, return_tensors="pt") for image in images]
        pixels = torch.cat([f["pixel_values"] for f in features])
        grid = torch.cat([f["image_grid_thw"] for f in features])
        text = _pack(tokenizer, grid[0].tolist(), asked)
        return Batch(pixels, grid, *_vision_labels(scenes), *text)


def _random_size(rng: random.Random, wide: int, high: int) -> tuple[int, int]:
    # Half of them at the package's size; beyond about 400 pixels all look alike once resized.
    shorter = 64 if rng.random() < 0.5 else int(64 * 6 ** rng.random())
    unit = max(1, round(shorter / min(wide, high)))
    return wide * unit, high * unit


def _resized(width: int, height: int) -> tuple[int, int]:
    return smart_resize(height, width, PATCH * MERGE, IMAGE_PIXELS, IMAGE_PIXELS)


def _random_picture(
    rng: random.Random, width: int, height: int, small: float
) -> tuple[Image.Image, Scene]:
    if rng.random() < _OTHER_SHARE:
        image, scene = draw_other(rng, width, height)
    else:
        largest = 2 / 9 if rng.random() < small else 1 / 2
        image, scene = draw(rng, width, height, largest=largest)
    if rng.random() < 0.25:
        file_format = rng.choice(("JPEG", "WEBP"))
        image = Image.open(io.BytesIO(encode(image, file_format, rng))).convert("RGB")
    return image, scene


def _random_question(rng: random.Random, scene: Scene) -> Question:
    ask = rng.choices(
        (package_question, english_question, chinese_question, stray_question), (42, 20, 34, 4)
    )[0]
    return ask(rng, scene)


@functools.cache
def _package_train_split() -> list[tuple[Image.Image, list[Question]]]:
    by_image: dict[int, list[Question]] = defaultdict(list)
    for text, answer, image_id in zip(*easy_vqa.get_train_questions(), strict=True):
        by_image[image_id].append(Question(text, answer, "package"))
    paths = easy_vqa.get_train_image_paths()
    return [(Image.open(paths[i]).convert("RGB"), questions) for i, questions in by_image.items()]


def _vision_labels(scenes: list[Scene | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    names, unknown = list(COLORS), Scene(None, None, None)
    shape, color, box = [], [], []
    for scene in scenes:
        known = scene or unknown
        shape.append(SHAPES.index(known.shape) if known.shape else len(SHAPES) if scene else -100)
        color.append(names.index(known.color) if known.color else -100)
        box.append(known.box or (float("nan"),) * 4)
    return torch.tensor(shape), torch.tensor(color), torch.tensor(box)


def _pack(tokenizer, grid: list[int], asked: list[list[Question]]):
    rows, columns = grid[1] // 2, grid[2] // 2
    opening = tokenizer.encode("<|im_start|>user\n<|vision_start|>")
    closing = tokenizer.encode("<|vision_end|>")
    turn = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    prefix = opening + [image] * (rows * columns) + closing
    after = len(opening) + max(rows, columns)
    grid_positions = np.indices((1, rows, columns)).reshape(3, -1) + len(opening)
    prefix_positions = np.concatenate(
        [np.tile(np.arange(len(opening)), (3, 1)), grid_positions, np.full((3, 1), after)], axis=1
    )
    packed, kinds = [], []
    for questions in asked:
        ids, labels, segment = list(prefix), [-100] * len(prefix), [0] * len(prefix)
        positions, spans = [prefix_positions], []
        for number, question in enumerate(questions, start=1):
            # As the service does: what the user wrote is text, whatever it looks like.
            prompt = tokenizer.encode(question.text, split_special_tokens=True) + turn
            answer = [*tokenizer.encode(question.answer), end]
            spans.append(
                (
                    question.kind,
                    len(ids) + len(prompt) - 1,
                    len(ids) + len(prompt) + len(answer) - 2,
                )
            )
            labels += [-100] * (len(prompt) - 1) + answer + [-100]
            ids += prompt + answer
            length = len(prompt) + len(answer)
            segment += [number] * length
            positions.append(np.tile(np.arange(length), (3, 1)) + after + 1)
        packed.append((ids, labels, segment, np.concatenate(positions, axis=1)))
        kinds.append(spans)
    longest = (max(len(ids) for ids, *_ in packed) + 15) // 16 * 16
    count = len(packed)
    input_ids = np.zeros((count, longest), dtype=np.int64)
    labels_out = np.full((count, longest), -100, dtype=np.int64)
    segments = np.full((count, longest), -1, dtype=np.int64)
    positions_out = np.zeros((3, count, longest), dtype=np.int64)
    for row, (ids, labels, segment, position) in enumerate(packed):
        input_ids[row, : len(ids)], labels_out[row, : len(ids)] = ids, labels
        segments[row, : len(ids)], positions_out[:, row, : len(ids)] = segment, position
    same = segments[:, :, None] == segments[:, None, :]
    mask = np.tril(np.ones((longest, longest), dtype=bool)) & (same | (segments[:, None, :] == 0))
    return (
        torch.from_numpy(input_ids),
        torch.from_numpy(labels_out),
        torch.from_numpy(positions_out),
        torch.from_numpy(mask[:, None]),
        kinds,
    )
