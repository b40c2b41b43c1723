"""Layers that no device has room for: accelerate fetches them, and the engine does not notice.

There is no second device here. But the disk is one to accelerate, with the same hooks, and weights
that are nowhere ("meta") between two calls.
"""

from __future__ import annotations

import dataclasses
import io
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from qwenvl_app.engine.engine import Engine
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.runner import Runner
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading.load import load
from tests.engines import (
    OPTIONS,
    agrees,
    finish,
    generate,
    random_request,
    request,
    running,
    spread,
    together,
)
from tests.wire import picture

TEXT = "model.language_model"
RESIDENT = ("embed_tokens", "norm", "rotary_emb")


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    """With a head of its own, as larger models have one."""
    wild = spread(load("demo"))
    model = wild.model
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(0.12 * torch.randn_like(model.lm_head.weight))
    return wild


def offloaded(wild: LoadedModel, directory: Path, *outside: str) -> LoadedModel:
    """The same weights, of which those of some modules are on the disk."""
    wild.model.save_pretrained(directory)
    layers = range(len(wild.model.model.language_model.layers))
    names = ["model.visual", "lm_head", *(f"{TEXT}.{name}" for name in RESIDENT)]
    names += [f"{TEXT}.layers.{number}" for number in layers]
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        directory,
        device_map={name: "disk" if name in outside else "cpu" for name in names},
        use_safetensors=True,
        local_files_only=True,
    )
    return dataclasses.replace(wild, model=model.eval())


def test_every_token_is_that_of_generate_on_the_whole_model(wild: LoadedModel, tmp_path: Path):
    outside = (f"{TEXT}.layers.1", f"{TEXT}.layers.3", f"{TEXT}.norm", "lm_head")
    partly = offloaded(wild, tmp_path, *outside)
    layers = partly.model.model.language_model.layers
    assert [layer.mlp.up_proj.weight.device.type for layer in layers] == ["cpu", "meta"] * 2
    assert Runner(partly.model).layout.devices == (torch.device("cpu"),) * 4
    assert Runner(partly.model).device == torch.device("cpu")
    rng = random.Random(3)
    asked = [(each, generate(wild, each)) for each in (random_request(rng) for _ in range(8))]
    with running(partly, prefix_cache_bytes=2**20) as engine:
        pairs = together(engine, asked)
    verdicts = [agrees(sequence, solo) for sequence, solo in pairs]
    assert False not in verdicts
    assert verdicts.count(None) <= 1


@pytest.mark.parametrize("room", [12_000_000, 15_000_000])
def test_as_accelerate_lays_it_out(room: int, caplog):
    """With a limit on the weights, as the plan sets one on each GPU: no layer, or half of them."""
    loaded = load("demo", max_memory={"cpu": room})
    outside = list(loaded.model.hf_device_map.values()).count("disk")
    assert f"{outside} parts of the model are outside the device" in caplog.text
    circle = Image.open(io.BytesIO(picture("circle", "blue", (128, 128)))).convert("RGB")
    with running(loaded) as engine:
        assert finish(engine.submit(request(circle, "what color is the shape?"))) == "blue"


def test_without_its_tower_it_is_refused(wild: LoadedModel, tmp_path: Path):
    with pytest.raises(ModelLoadError, match="no room even for the vision tower"):
        Engine(offloaded(wild, tmp_path, "model.visual"), OPTIONS)
