"""generation_config.json: what is off, what can't be used, and the one warning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig

from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading.checkpoint import DEMO
from qwenvl_app.loading.generation_defaults import load
from qwenvl_app.loading.load import load as load_model
from tests.engines import finish, request, running

CONFIG = AutoConfig.from_pretrained(DEMO)
OWN = json.loads((DEMO / "generation_config.json").read_text())


def defaults(directory: Path, settings: dict[str, Any]) -> Any:
    (directory / "generation_config.json").write_text(json.dumps(OWN | settings))
    return load(directory, CONFIG)


@pytest.mark.parametrize(
    ("settings", "settled"),
    [
        ({"do_sample": True, "temperature": 0}, {"do_sample": False, "temperature": None}),
        ({"do_sample": True, "temperature": 0.0}, {"do_sample": False, "temperature": None}),
        ({"do_sample": True, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": None}, {"top_k": None}),
        ({"top_p": 1.0, "typical_p": 1}, {"top_p": None, "typical_p": None}),
        ({"top_p": 0}, {"top_p": 0}),  # the likeliest, to generate
        ({"min_p": 0.0}, {"min_p": None}),
        ({"repetition_penalty": 1}, {"repetition_penalty": None}),
        ({"no_repeat_ngram_size": 0, "min_length": 0}, {"no_repeat_ngram_size": None}),
        ({"epsilon_cutoff": 0.0, "eta_cutoff": 1.0}, {"epsilon_cutoff": None, "eta_cutoff": None}),
        ({"suppress_tokens": [], "bad_words_ids": []}, {"suppress_tokens": None}),
        ({"bad_words_ids": [[3, 4]], "min_new_tokens": 2}, {"bad_words_ids": [[3, 4]]}),
    ],
    ids=str,
)
def test_values_that_switch_a_step_off(tmp_path, caplog, settings, settled):
    found = defaults(tmp_path, settings)
    assert {name: getattr(found, name) for name in settled} == settled
    assert not [each for each in caplog.records if each.name.startswith("qwenvl_app")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "0.7"}, "temperature '0.7', which can't be used; the log has why"),
        ({"temperature": -1}, "temperature -1, which can't be used; the log has why"),
        ({"top_p": 1e-3, "top_k": "20"}, "top_k '20', which can't be used; the log has why"),
        ({"top_p": -0.5}, "top_p -0.5, which can't be used; the log has why"),
        ({"min_p": 2}, "min_p 2, which can't be used; the log has why"),
        ({"repetition_penalty": 0}, "repetition_penalty 0, which can't be used; the log has why"),
        ({"typical_p": 0}, "typical_p 0, which can't be used; the log has why"),
        ({"bad_words_ids": [3]}, "bad_words_ids [3], which can't be used; the log has why"),
        (
            {"bad_words_ids": [[99999]]},
            "bad_words_ids [[99999]], which can't be used; the log has why",
        ),
        ({"suppress_tokens": "x"}, "suppress_tokens 'x', which can't be used; the log has why"),
        ({"do_sample": "false"}, "do_sample 'false'; it is true or false"),
        ({"eos_token_id": "x"}, "eos_token_id 'x', which is no token's"),
        ({"eos_token_id": [99999]}, "eos_token_id [99999], which is no token's"),
        ({"eos_token_id": []}, "no eos_token_id: no answer would ever end"),
        ({"eos_token_id": None}, "no eos_token_id: no answer would ever end"),
    ],
    ids=str,
)
def test_values_that_can_t_be_used(tmp_path, settings, message):
    """They failed at the first answer, each as an unexpected error."""
    with pytest.raises(ModelLoadError) as error:
        defaults(tmp_path, settings)
    assert str(error.value) == f"generation_config.json has {message}"


@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 2}, {"early_stopping": 7}, {"watermarking_config": {"colour": 1}}],
    ids=str,
)
def test_values_that_transformers_does_not_read(tmp_path, settings):
    with pytest.raises(ModelLoadError, match=r"generation_config\.json can't be used, the log has"):
        defaults(tmp_path, settings)


def test_the_rest_is_named_in_one_warning(tmp_path, caplog):
    ignored = {
        "num_beams": 4,
        "stop_strings": ["x"],
        "guidance_scale": 1.5,
        "forced_eos_token_id": 1024,
        "token_healing": True,
        "chat_format": "chatml",
    }
    silent = {
        "max_length": 4096,
        "max_new_tokens": 512,
        "num_return_sequences": 1,
        "length_penalty": 1.0,
        "use_cache": True,
        "top_p": 0.8,
        "suppress_tokens": [3],
    }
    defaults(tmp_path, ignored | silent)
    (record,) = (each for each in caplog.records if each.name.startswith("qwenvl_app"))
    named = record.getMessage().removeprefix("generation_config.json has what is not used here: ")
    assert set(named.split(", ")) == set(ignored)


def test_without_the_file_it_is_config_json(tmp_path):
    with pytest.raises(ModelLoadError, match="no eos_token_id"):
        load(tmp_path, CONFIG)


def test_a_checkpoint_that_says_temperature_0_and_sample(tmp_path):
    """As vLLM's users write greedy: it failed at its first answer, in the warm-up."""
    directory = Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))
    settings = OWN | {"do_sample": True, "temperature": 0, "top_k": -1}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    answers = []
    for name in ("demo", str(directory)):
        with running(load_model(name)) as engine:
            answers.append(finish(engine.submit(request(Image.new("RGB", (64, 64), "red")))))
    assert answers[0] == answers[1]
