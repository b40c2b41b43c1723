"""Every family that is supported: a checkpoint laid out as published loads, and is answered right.

What is not about a family, ``test_engine.py`` has.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl_app import create_app
from qwenvl_app.backends.local import LocalBackend
from qwenvl_app.engine import fused, native
from qwenvl_app.engine.inputs import mrope_positions, prepare
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.runner import Runner
from qwenvl_app.engine.vision import VisionPass, VisionTower
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.generation import GenerationRequest, Phase
from qwenvl_app.loading.checkpoint import FAMILIES
from qwenvl_app.settings import load_settings
from tests import families
from tests.engines import (
    Solo,
    finish,
    generate,
    inputs_of,
    judge,
    random_image,
    random_request,
    request,
    running,
    together,
)
from tests.waiting import until
from tests.wire import GOOD, MULTIPART, ROUTE


@pytest.fixture(scope="module", params=FAMILIES)
def wild(request, tmp_path_factory) -> LoadedModel:
    return families.wild(tmp_path_factory.mktemp("family") / request.param, request.param)


@pytest.fixture(scope="module")
def asked(wild) -> list[tuple[GenerationRequest, Solo]]:
    return solos(wild, 12, 6)


@pytest.fixture(scope="module")
def more(wild, asked) -> list[tuple[GenerationRequest, Solo]]:
    """As many again."""
    return [*asked, *solos(wild, 13, 6)]


def solos(wild: LoadedModel, seed: int, count: int) -> list[tuple[GenerationRequest, Solo]]:
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(count)]
    return [(each, generate(wild, each)) for each in requests]


@pytest.mark.parametrize(
    ("whose", "slots", "chunk", "prefix", "rounds"),
    [
        ("asked", 4, 100, 2**27, 2),
        *(
            pytest.param("more", *case, marks=pytest.mark.slow)
            for case in (
                *((4, 7, 0, 1), (1, 1024, 0, 1), (4, 1024, 0, 1), (4, 64, 0, 1)),
                *((16, 31, 2**19, 3), (4, 100, 2**27, 3)),
            )
        ),
    ],
)
def test_every_token_is_that_of_generate(
    wild, request, whose: str, slots: int, chunk: int, prefix: int, rounds: int
):
    """Joining and leaving at random steps; after the first round the pictures are known."""
    asked = request.getfixturevalue(whose)
    rng = random.Random(slots * chunk)
    with running(wild, slots=slots, prefill_chunk=chunk, prefix_cache_bytes=prefix) as engine:
        pairs = []
        for _ in range(rounds):
            for each, solo in asked:
                pairs.append((engine.submit(each), solo))
                time.sleep(rng.random() * 0.01)
            for sequence, _ in pairs[-len(asked) :]:
                finish(sequence)
        hits = engine.prefixes.hits
    judge(pairs)
    if prefix == 2**27:
        assert hits >= (rounds - 1) * len(asked)


@pytest.mark.parametrize("wild", families.USUAL, indirect=True, scope="module")
@pytest.mark.parametrize("change", ["packed", "native", "eager"])
@pytest.mark.parametrize("whose", ["asked", pytest.param("more", marks=pytest.mark.slow)])
def test_nor_does_it_matter_how_products_are_made(
    wild, whose: str, change: str, request, monkeypatch
):
    """Packed: layers and activations are replaced. Eager: that attention adds its mask."""
    other = dataclasses.replace(wild, model=copy.deepcopy(wild.model))
    if change == "native":
        made = native.create(other.model, 2**30)
        # Of the language models' heads Qwen2.5-VL's alone have a published size here.
        old = wild.model.config.model_type == "qwen2_5_vl"
        assert (bool(made.text), bool(made.tower)) == (old, not old)
        other = dataclasses.replace(other, native=made)
    elif change == "packed":
        monkeypatch.setattr(fused, "LEAST", 0)
        fused.fuse(other.model)
    else:
        other.model.set_attn_implementation("eager")
    with running(other, prefill_chunk=50) as engine:
        pairs = together(engine, request.getfixturevalue(whose))
    judge(pairs)


@pytest.mark.slow  # test_compiled.py has the family that is served
@pytest.mark.timeout(600)  # torch.compile takes most of a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_compiled(wild, more):
    """See ``test_compiled.py``. A recurrent layer's state is not among what is compiled."""
    if wild.model.config.model_type.startswith("qwen3_5"):
        with pytest.raises(ModelLoadError, match="does not know this model's recurrent layers"):
            Runner(wild.model, mode="on")
        return
    other = dataclasses.replace(wild, model=copy.deepcopy(wild.model))
    fused.fuse(other.model)  # as the backend does
    with running(other, compile="on") as engine:
        pairs = together(engine, more)
    judge(pairs)


def test_answers_are_not_all_alike(asked):
    """Or they would prove nothing."""
    assert len({tuple(solo.tokens) for _, solo in asked}) > len(asked) // 2


def test_positions_are_those_of_transformers(wild):
    rng = random.Random(5)
    for _ in range(20):
        each = random_request(rng)
        inputs = inputs_of(wild, each)
        theirs, delta = wild.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        ours = prepare(wild, each)
        assert torch.equal(ours.positions, theirs[:, 0])
        # The answer's first token goes on from there.
        assert ours.positions[0, -1] + 1 == len(ours.ids) + delta.item()
        assert list(ours.images[0].grid) == inputs["image_grid_thw"][0].tolist()
        assert len(wild.patcher.patches(each.images[0])) == ours.images[0].patches
    assert mrope_positions(9, [(range(2, 6), (1, 4, 4))], 2).tolist()[1] == [
        0,
        1,
        2,
        2,
        3,
        3,
        4,
        5,
        6,
    ]


def test_the_vision_tower_in_pieces_is_the_vision_tower(wild):
    rng = random.Random(6)

    pictures = [random_image(rng) for _ in range(3)]
    theirs, spans = [], []
    for picture in pictures:
        resized = wild.patcher.resized(picture)
        theirs.append(wild.patcher.processor(images=[resized], return_tensors="pt").pixel_values)
        spans += prepare(wild, request(picture, "x")).images
        spans[-1].pixels = wild.patcher.patches(picture)
    visual = wild.model.model.visual
    with torch.inference_mode():
        whole = visual(
            torch.cat(theirs),
            grid_thw=torch.tensor([span.grid for span in spans]),
        )
    for tower in {None, native.create(wild.model, 2**30).tower}:  # in C++ too, if that has it
        with torch.inference_mode():
            encoding = VisionPass(VisionTower(visual, tower), spans)
            assert encoding.advance(0, 1) is None
            assert encoding.advance(1, 3) is None
            features = encoding.advance(3, 4)
        # The first layer's convolution is done as a product here, which rounds otherwise.
        near = {"atol": 1e-4, "rtol": 1e-5}
        embeds = torch.cat([f.embeds for f in features])
        torch.testing.assert_close(embeds, whole.pooler_output, **near)
        layers = getattr(whole, "deepstack_features", ())
        assert [len(f.deepstack) for f in features] == [len(layers)] * 3
        for number, layer in enumerate(layers):
            added = torch.cat([f.deepstack[number] for f in features])
            torch.testing.assert_close(added, layer, **near)


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_the_published_numbers(name: str):
    """Made whole, they would have as many parameters as the published files."""
    family, changes, parameters = families.PUBLISHED[name]
    settings = families.CONFIGS[family] | changes
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_over_http(tmp_path, family: str):
    directory = families.make(tmp_path / family, family)
    settings = load_settings(
        {}, model=str(directory), device="cpu", dtype="bfloat16", max_new_tokens=8
    )
    backend = LocalBackend(settings)
    until(lambda: backend.status().phase is not Phase.LOADING, 60)
    app = create_app(settings, backend)
    client = app.test_client()
    assert client.get("/readyz").json["phase"] == "ready"
    answer = client.post(ROUTE, data=GOOD, content_type=MULTIPART)
    assert answer.status_code == 200
    assert answer.json["result"]
    app.extensions["qwenvl"]["disconnects"].close()
    backend.close()
