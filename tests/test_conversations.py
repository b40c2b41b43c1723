"""Conversations, token for token as ``model.generate`` answers each of their turns alone."""

from __future__ import annotations

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from qwenvl_app.engine.engine import Engine
from qwenvl_app.engine.inputs import prepare
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.engine.vision import VisionPass
from qwenvl_app.generation import GenerationRequest, Message, SamplingParams
from tests import families
from tests.engines import finish, generate, inputs_of, judge, random_image, request, running

WORDS = ("描述", "what color ", "图", "is there ", "🎉", "<|im_end|>", "a", "\n", "and ")
Turn = tuple[GenerationRequest, Sequence]


@pytest.fixture(scope="module", params=families.USUAL)
def wild(request, tmp_path_factory) -> LoadedModel:
    return families.wild(tmp_path_factory.mktemp("family") / request.param, request.param)


def ask(messages: list[Message], **options) -> GenerationRequest:
    sampling = {"max_new_tokens": 8, "ignore_eos": True} | options
    return GenerationRequest(tuple(messages), "id", SamplingParams(**sampling))


class Script:
    """What a user says and shows, turn by turn: 0 to 4 pictures in 1 to 5 turns."""

    def __init__(self, rng: random.Random, pictures: list[Image.Image]):
        def words() -> str:
            return "".join(rng.choice(WORDS) for _ in range(rng.choice((1, 4, 20))))

        self.system = [Message("system", (words(),))] if rng.random() < 0.3 else []
        self.turns: list[list[str | Image.Image]] = [[words()] for _ in range(rng.randint(1, 5))]
        for _ in range(rng.randint(0, 4)):
            turn = rng.choice(self.turns)
            turn.insert(rng.randint(0, len(turn)), rng.choice(pictures))
        for turn in self.turns:
            if rng.random() < 0.3:
                turn.append(words())
        self.lengths = [rng.choice((1, 3, 6, 12)) for _ in self.turns]


def play(engine: Engine, script: Script) -> list[Turn]:
    """All turns, each after the answers to those before."""
    messages, turns = list(script.system), []
    for content, length in zip(script.turns, script.lengths, strict=True):
        messages.append(Message("user", tuple(content)))
        asked = ask(messages, max_new_tokens=length)
        sequence = engine.submit(asked)
        messages.append(Message("assistant", (finish(sequence),)))
        turns.append((asked, sequence))
    return turns


def scripts(seed: int, count: int) -> list[Script]:
    """Two and two they are alike, but for what is in the pictures."""
    rng = random.Random(seed)
    sizes = [(rng.randint(40, 160), 90) for _ in range(4)]
    variants = [[random_image(rng).resize(size) for size in sizes] for _ in range(2)]
    return [
        Script(random.Random(f"{seed} {number // 2}"), variants[number % 2])
        for number in range(count)
    ]


@pytest.mark.parametrize(
    "count", [4, pytest.param(64, marks=(pytest.mark.slow, pytest.mark.timeout(400)))]
)
def test_every_token_is_that_of_generate(wild, count: int):
    """Four at once, first with what was computed for earlier turns, then without."""
    with (
        running(wild, prefix_cache_bytes=2**27, prefill_chunk=100) as engine,
        ThreadPoolExecutor(4) as threads,
    ):
        played = threads.map(lambda script: play(engine, script), scripts(count, count))
        turns = [turn for each in played for turn in each]
    with running(wild, prefill_chunk=60) as engine:
        again = [engine.submit(asked) for asked, _ in turns]
        for sequence in again:
            finish(sequence)
    solos = [generate(wild, asked) for asked, _ in turns]
    judge([(sequence, solo) for (_, sequence), solo in zip(turns, solos, strict=True)])
    judge(list(zip(again, solos, strict=True)))
    assert sum(sequence.cached for _, sequence in turns) > len(turns) * 16
    assert not any(sequence.cached for sequence in again)


def test_positions_are_those_of_transformers(wild):
    for script in scripts(7, 20):
        asked = ask([*script.system, *(Message("user", tuple(turn)) for turn in script.turns)])
        inputs, ours = inputs_of(wild, asked), prepare(wild, asked)
        theirs, delta = wild.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw")
        )
        assert torch.equal(ours.positions, theirs[:, 0])
        assert ours.positions[0, -1] + 1 == len(ours.ids) + delta.item()


def test_the_next_turn_sees_no_picture_again(wild, monkeypatch):
    """And of a recurrent model it begins at the last picture at least."""
    seen: list[int] = []
    real = VisionPass.__init__

    def counted(self, tower, images):
        seen.append(len(images))
        assert all(image.pixels is not None for image in images)
        real(self, tower, images)

    monkeypatch.setattr(VisionPass, "__init__", counted)
    rng = random.Random(3)
    first, second, third = (random_image(rng) for _ in range(3))
    messages = [Message("user", (first, "and", second, "?"))]
    with running(wild, prefix_cache_bytes=2**27) as engine:
        for more in ((), (third,), ()):
            sequence = engine.submit(ask(messages))
            messages.append(Message("assistant", (finish(sequence),)))
            messages.append(Message("user", (*more, "what else?")))
            images = sequence.inputs.images
            assert not any(image.pixels is not None or image.features for image in images)
        sequence = engine.submit(ask(messages))
        finish(sequence)
        assert sequence.cached >= sequence.inputs.images[2].tokens.stop
    assert seen == [2, 1]


def test_the_same_picture_after_another_history_is_no_hit(wild):
    """What was kept of it depends on all before it."""
    rng = random.Random(4)
    image, other = random_image(rng), random_image(rng)
    asked = [
        ask([*before, Message("user", (*shown, image, "?"))])
        for before in ([], [Message("system", ("Be brief.",))], [Message("system", ("Be long.",))])
        for shown in ((), (other,), ("x",))
    ]
    with running(wild, prefix_cache_bytes=2**27) as engine:
        sequences = []
        for each in asked:
            sequences.append(engine.submit(each))
            finish(sequences[-1])
            assert sequences[-1].cached < sequences[-1].inputs.images[-1].tokens.start + 1
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked, strict=True)])


def test_pixels_limit_a_picture_and_are_part_of_its_key(wild):
    image = random_image(random.Random(5)).resize((300, 300))
    side = wild.patcher.side * wild.patcher.merge
    with running(wild, prefix_cache_bytes=2**27) as engine:
        pairs = []
        for limits in ((None, None), (None, 4 * side**2), (150 * side**2, None), (None, 10**9)):
            asked = dataclasses.replace(request(image, max_new_tokens=6), pixels=limits)
            pairs.append((engine.submit(asked), generate(wild, asked)))
            finish(pairs[-1][0])
        judge(pairs)
    sizes = [len(sequence.inputs.images[0].tokens) for sequence, _ in pairs]
    assert sizes[1] <= 4 < sizes[0] < sizes[2]
    assert sizes[3] == sizes[0]  # never more than the checkpoint's
    found = [s.cached > s.inputs.images[0].tokens.start for s, _ in pairs]
    assert found == [False, False, False, True]


def test_nobody_finds_what_was_computed_for_another_owner(wild):
    """The count of cached tokens, and the time, told who had asked about a picture before."""
    image = random_image(random.Random(6))
    asked = {
        owner: dataclasses.replace(
            ask([Message("system", ("Be brief. " * 20,)), Message("user", (image, "?"))]),
            owner=owner,
        )
        for owner in ("", "a", "b")
    }
    with running(wild, prefix_cache_bytes=2**27) as engine:
        for owners, cached in ((("", "a", "b"), False), (("a", "b", ""), True)):
            sequences = [engine.submit(asked[owner]) for owner in owners]  # all at once
            for sequence in sequences:
                finish(sequence)
            assert [sequence.cached > 0 for sequence in sequences] == [cached] * 3
