"""What only generation_config.json asks for: the engine's tokens are those of ``generate``."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
from transformers import WatermarkingConfig

from qwenvl_app.engine.inputs import prepare
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.generation import GenerationRequest
from qwenvl_app.loading.load import load
from tests.engines import finish, generate, random_image, request, running, spread


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    return spread(load("demo"), layers=2)


@pytest.fixture(scope="module")
def asked() -> GenerationRequest:
    return request(random_image(random.Random(3)), "描述图描述图描述", max_new_tokens=16)


@pytest.fixture(scope="module")
def plain(wild, asked) -> list[int]:
    return answered(wild, asked, {})


def answered(wild: LoadedModel, asked: GenerationRequest, settings: dict[str, Any]) -> list[int]:
    """The engine's tokens, having checked that they are generate's."""
    model = copy.copy(wild.model)
    model.generation_config = copy.deepcopy(wild.model.generation_config)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    loaded = dataclasses.replace(wild, model=model)
    with running(loaded) as engine:
        sequence = engine.submit(asked)
        finish(sequence)
    assert sequence.tokens == generate(loaded, asked).tokens
    return sequence.tokens


def first_of(plain: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """``settings``, where the answer that is to be changed is spelled by its tokens' places."""

    def spelled(value: Any) -> Any:
        if isinstance(value, list):
            return [spelled(each) for each in value]
        return plain[int(value[1:])] if isinstance(value, str) and value[0] == "#" else value

    return {name: spelled(value) for name, value in settings.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_bias": [[["#0"], -50.0]]},
        {"sequence_bias": [[["#2", "#3"], -50.0]]},
        {"bad_words_ids": [["#0"], ["#4", "#5"]]},
        {"suppress_tokens": ["#0", "#3"]},
        {"begin_suppress_tokens": ["#0"]},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 3.0},
        {"repetition_penalty": 1.5, "sequence_bias": [[["#1"], -5.0]], "no_repeat_ngram_size": 2},
        {"watermarking_config": WatermarkingConfig(bias=30.0)},
        {"exponential_decay_length_penalty": (2, 50.0)},
        {"exponential_decay_length_penalty": [2, 50.0], "min_new_tokens": 9},
    ],
    ids=", ".join,
)
def test_processors(wild, asked, plain, settings: dict[str, Any]):
    """They were ignored in silence."""
    assert answered(wild, asked, first_of(plain, settings)) != plain


def test_an_answer_that_may_not_repeat_the_prompt(wild, asked):
    repeating = {"encoder_repetition_penalty": 100.0}
    repeated = answered(wild, asked, repeating)
    assert answered(wild, asked, repeating | {"encoder_no_repeat_ngram_size": 1}) != repeated


@pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
def test_an_answer_that_may_not_end_yet(wild, asked, plain, name: str):
    ends = {"eos_token_id": [plain[3]]}
    short = answered(wild, asked, ends)
    assert len(short) <= 4
    prompt = 0 if name == "min_new_tokens" else len(prepare(wild, asked).ids)
    assert len(answered(wild, asked, ends | {name: prompt + 12})) > len(short)


@pytest.mark.parametrize(
    "settings",
    [
        {"typical_p": 1e-6},
        {"epsilon_cutoff": 0.999},
        {"eta_cutoff": 0.999, "top_k": 2},
        {"top_h": 1e-6},
        {"top_k": 1, "watermarking_config": WatermarkingConfig(bias=30.0)},
        {"typical_p": 1e-6, "temperature": 2.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=", ".join,
)
def test_steps_of_a_draw(wild, asked, settings: dict[str, Any]):
    """Each leaves one token, so that what is drawn is no accident."""
    answered(wild, asked, {"do_sample": True, "top_k": 0} | settings)


def test_a_row_with_processors_leaves_others_alone(wild, asked, plain):
    model = copy.copy(wild.model)
    model.generation_config = copy.deepcopy(wild.model.generation_config)
    model.generation_config.begin_suppress_tokens = [plain[0]]
    with running(dataclasses.replace(wild, model=model)) as engine:
        several = [engine.submit(asked) for _ in range(3)]
        for each in several:
            finish(each)
    assert several[0].tokens == several[1].tokens == several[2].tokens
    assert several[0].tokens[0] != plain[0]
