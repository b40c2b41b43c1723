"""What is read from a checkpoint's files, against the loaded model and published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig

from qwenvl_app.engine.pixels import Patcher
from qwenvl_app.engine.runner import Runner
from qwenvl_app.loading.checkpoint import Checkpoint, find
from qwenvl_app.loading.footprint import estimate
from qwenvl_app.loading.load import load
from qwenvl_app.loading.processing import image_processor
from tests import real_shape

GIB = 2**30
BIG = 178e6
PIXELS = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}


def test_the_embedded_model_takes_what_was_foreseen():
    """Parameters, bytes and the KV cache's token, against the loaded model itself."""
    model = load("demo").model
    need = estimate(find("demo"), "auto", BIG, cpu=False)
    parameters = sum(p.numel() for p in model.parameters())
    assert need.parameters == parameters
    assert need.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert need.kv_token == Runner(model).layout.token_bytes
    assert need.dtype == "float32"
    assert need.picture_tokens == 16
    layers = model.model.language_model.layers
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    assert need.layer == max(sizes)
    half = estimate(find("demo"), "bfloat16", BIG, cpu=False)
    assert (half.weights, half.kv_token) == (need.weights // 2, need.kv_token // 2)


def write(
    directory: Path,
    config: dict[str, Any],
    *,
    processor: dict[str, Any] = PIXELS,
    stored: int = 0,
) -> Checkpoint:
    """A checkpoint without weights: two files of zeros in their place, of ``stored`` bytes."""
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    files = {"a": "1.safetensors", "b": "2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for file in files.values():
        with (directory / file).open("wb") as stream:
            stream.truncate(stored // 2)
    return Checkpoint(directory, config)


def test_an_8b_model_takes_what_the_readme_says(tmp_path: Path):
    """17.5 GB of weights, as its published index says, and 144 KiB a token."""
    need = estimate(write(tmp_path, real_shape.config()), "auto", 50e6, cpu=False)
    assert need.weights == 17_534_247_392
    assert need.parameters == need.weights // 2
    assert need.layer == 2 * 151936 * 4096  # the head
    assert need.kv_token == 144 * 1024
    assert need.picture_tokens == 16384  # what the processor makes of the largest picture
    assert 2.5 * GIB < need.tower < 3.5 * GIB


def configured(name: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """config.json of another family, as the installed transformers writes it."""
    config: dict[str, Any] = json.loads(AutoConfig.for_model(name).to_json_string())
    config["text_config"] |= text
    config["vision_config"] |= vision
    return config


# Qwen2.5-VL-7B and Qwen3.5 with 32 layers, of which 8 keep keys and values.
QWEN25 = configured(
    "qwen2_5_vl",
    {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 128000}
    | {"layer_types": None},
    {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
)
QWEN35 = configured("qwen3_5", {}, {"out_hidden_size": 4096})


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """As Qwen2.5-VL was published: the language model's settings are at the top."""
    top = {key: value for key, value in config.items() if key != "text_config"}
    return config["text_config"] | top


@pytest.mark.parametrize("config", [QWEN25, flat(QWEN25)], ids=["nested", "flat"])
def test_qwen25(tmp_path: Path, config: dict[str, Any]):
    """Patches of 14 pixels, and limits under their older names."""
    processor = {"min_pixels": 3136, "max_pixels": 12845056}
    need = estimate(write(tmp_path, config, processor=processor), "bfloat16", 50e6, cpu=False)
    assert need.kv_token == 2 * 28 * 4 * 128 * 2
    assert need.picture_tokens == 16384
    assert need.patches == 65536
    assert 2 * GIB < need.tower < 4 * GIB


LIMITS: list[tuple[dict[str, Any], int]] = [
    ({"size": {"longest_edge": 500_000, "shortest_edge": 10_000}}, 500_000),
    ({"size": {"longest_edge": 500_000, "shortest_edge": 10_000}, "max_pixels": 90_000}, 90_000),
    ({"size": {"longest_edge": 90_000, "shortest_edge": 10_000}, "max_pixels": 500_000}, 500_000),
    ({"size": {"longest_edge": 9_000, "shortest_edge": 9_000}, "min_pixels": 90_000}, 90_000),
    ({"size": {"max_pixels": 500_000, "min_pixels": 10_000}}, 500_000),
    ({"size": {"max_pixels": 9, "min_pixels": 1}, "max_pixels": 80_000, "min_pixels": 10}, 80_000),
    ({"max_pixels": 500_000, "min_pixels": 10_000}, 500_000),
    ({"max_pixels": 500_000}, 500_000),
    ({"min_pixels": 2_000_000}, 2_000_000),
    ({}, 28 * 28 * 1280),
    ({"size": {"longest_edge": 5e5, "shortest_edge": 1e4}}, 500_000),
]


@pytest.mark.parametrize(("settings", "pixels"), LIMITS)
def test_the_limits_are_those_that_the_processor_takes(tmp_path: Path, settings, pixels: int):
    """The plan read them in another order: too little memory, or a model refused that fits."""
    files = write(tmp_path, real_shape.config(), processor=settings)
    need = estimate(files, "auto", 50e6)
    assert need.pixels == pixels
    processor = image_processor(files.directory)
    areas = []
    for picture in (Image.new("RGB", (2000, 2000)), Image.new("RGB", (64, 64))):
        made = processor(images=[picture], return_tensors="pt")
        grid = tuple(made["image_grid_thw"][0].tolist())
        assert Patcher(processor).grid(picture) == grid
        areas.append(grid[1] * grid[2] * processor.patch_size**2)
    # Sides are whole patches: a shrunk picture has a little less, an enlarged one a little more.
    side = 2 * processor.patch_size
    assert 0.85 * pixels < max(areas) <= (pixels**0.5 + side) ** 2


def test_qwen35(tmp_path: Path):
    """Three of four layers keep a state of fixed size in place of a token's keys and values."""
    need = estimate(write(tmp_path, QWEN35), "bfloat16", 50e6, cpu=False)
    assert need.kv_token == 2 * 8 * 4 * 256 * 2
    matrices, convolved = 32 * 128 * 128 * 4, (2 * 16 + 32) * 128 * 4 * 2
    assert need.state == 24 * (matrices + convolved)


def test_a_mixture_of_experts(tmp_path: Path):
    """All experts' weights are there."""
    config = configured("qwen3_vl_moe", {}, {})
    need = estimate(write(tmp_path, config), "bfloat16", 50e6, cpu=False)
    experts = 3 * 60 * 2048 * 1408
    assert 2 * experts < need.layer < 1.1 * 2 * experts
    assert need.weights > config["text_config"]["num_hidden_layers"] * 2 * experts


def quantised(method: str) -> dict[str, Any]:
    return real_shape.config() | {"quantization_config": {"quant_method": method}}


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_weights_that_stay_quantised_take_what_their_files_do(tmp_path: Path, method: str):
    files = write(tmp_path, quantised(method), stored=5_000_000_000)
    need = estimate(files, "bfloat16", 50e6, cpu=False, expands_fp8=False)
    assert need.weights == 5_000_000_000
    assert 0 < need.layer < 2 * 151936 * 4096 / 3
    assert need.parameters == 17_534_247_392 // 2
    assert need.quantised == method


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_weights_that_are_turned_back_take_what_they_did(tmp_path: Path, method: str):
    """fp8 counted as one byte too where it is turned to bfloat16."""
    files = write(tmp_path, quantised(method), stored=9_000_000_000)
    need = estimate(files, "bfloat16", 50e6, cpu=False, expands_fp8=True)
    assert need.weights == 17_534_247_392
    assert need.quantised == method


def test_a_smaller_limit_on_pictures(tmp_path: Path):
    files = write(tmp_path, real_shape.config())
    need = estimate(files, "auto", 50e6)
    assert need.at(need.pixels) == need.at(1e9) == need
    half = need.at(need.pixels / 2)
    assert (half.patches, half.picture_tokens) == (need.patches // 2, need.picture_tokens // 2)
    assert half == estimate(files, "auto", need.pixels / 2)
