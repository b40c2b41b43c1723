"""The demo model's training data says the truth, and packing questions changes nothing."""

from __future__ import annotations

import random
from collections import defaultdict

import easy_vqa
import numpy as np
import pytest
import torch

from demo.data import Batches, Mix, _pack
from demo.questions import Question, chinese_question, package_question
from demo.scenes import COLORS, SHAPES, Scene, draw
from demo.train import answer, look
from qwenvl_app.loading.checkpoint import DEMO
from qwenvl_app.loading.load import load

BOX = (0.1, 0.1, 0.4, 0.4)


@pytest.mark.parametrize("size", [(64, 64), (300, 120)])
def test_a_drawn_picture_shows_what_its_scene_says(size: tuple[int, int]):
    rng = random.Random(1)
    for _ in range(50):
        image, scene = draw(rng, *size)
        left, top, right, bottom = scene.box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        # A little below the middle is inside a triangle too.
        at = (int((left + right) / 2 * size[0]), int((top + 2 * bottom) / 3 * size[1]))
        assert np.abs(np.array(image.getpixel(at)) - COLORS[scene.color]).max() < 30


def test_our_package_questions_are_the_packages():
    """Same wordings, and for every question of its test split the same answer."""
    rng = random.Random(2)
    answers: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for shape in SHAPES:
        for color in COLORS:
            for _ in range(3000):
                question = package_question(rng, Scene(shape, color, BOX))
                answers[shape, color][question.text] = question.answer
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, right, number in zip(*easy_vqa.get_test_questions(), strict=True):
        by_image[number].append((text, right))
    checked = 0
    for questions in by_image.values():
        shape = next((right for _, right in questions if right in SHAPES), None)
        color = next((right for _, right in questions if right in COLORS), None)
        if shape and color:
            for text, right in questions:
                assert answers[shape, color].get(text, right) == right
                checked += text in answers[shape, color]
    assert checked > 4000


def test_chinese_answers_name_colour_and_shape():
    rng = random.Random(3)
    for _ in range(500):
        question = chinese_question(rng, Scene("triangle", "teal", BOX))
        assert "三角形" in question.answer
        assert "青色" in question.answer
        if (
            question.kind in ("yes/no", "is it")
            and "三角" in question.text
            and "红" in question.text
        ):
            assert question.answer.startswith(("没有", "不是"))


def test_a_batch_depends_on_its_seed_and_number_only():
    first, again = (Batches(DEMO, 5, 3, Mix(2, 2))[1] for _ in range(2))
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.pixels, Batches(DEMO, 6, 3, Mix(2, 2))[1].pixels[:])


def test_packed_questions_are_as_if_each_were_alone():
    """Training packs all questions of a picture into one sequence; ``generate`` never does."""
    loaded = load("demo")
    batch = Batches(DEMO, 9, 1, Mix(2, 3, square=0))[0]
    asked = [[Question(t, "图中有一个", "x") for t in ("是什么颜色？", "有圆吗", "what?")]] * 2
    grid = batch.grid[0].tolist()

    def logits(questions: list[list[Question]]) -> torch.Tensor:
        ids, labels, positions, mask, kinds = _pack(loaded.tokenizer, grid, questions)
        packed = batch._replace(
            input_ids=ids, labels=labels, position_ids=positions, mask=mask, kinds=kinds
        )
        with torch.no_grad():
            return answer(loaded.model, packed, *look(loaded.model, packed))

    together = logits(asked).view(2, 3, -1, loaded.model.config.text_config.vocab_size)
    for number in range(3):
        alone = logits([[questions[number]] for questions in asked])
        assert torch.allclose(together[:, number].flatten(0, 1), alone, atol=1e-4)
