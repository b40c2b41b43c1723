"""Quantised checkpoints that need no GPU: what they answer, and what they take.

bitsandbytes was tried by hand (docs/models.md): its wheel is too large for a test.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from PIL import Image
from safetensors.torch import load_file, save_file

from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading.checkpoint import DEMO, find
from qwenvl_app.loading.footprint import estimate
from qwenvl_app.loading.load import load
from tests.engines import finish, request, running
from tests.wire import picture

Quantise = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
BLOCK, GROUP = 64, 32


def blocks(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As Qwen publishes its own -FP8 checkpoints: a scale for each square of weights."""
    rows, columns = weight.shape
    squares = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = squares.abs().amax((1, 3), keepdim=True) / 448
    stored = (squares / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {f"{name}.weight": stored, f"{name}.weight_scale_inv": scale[:, 0, :, 0].contiguous()}


def channels(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {f"{name}.weight": stored, f"{name}.weight_scale": scale}


def four_bits(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight weights a word."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // GROUP, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7.5
    whole = (groups / scale).round().clamp(-8, 7).reshape(rows, columns).to(torch.int8)
    return {
        f"{name}.weight_packed": pack_to_int32(whole, 4).contiguous(),
        f"{name}.weight_scale": scale[:, :, 0].contiguous(),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def compressed(layout: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*visual.*"],
    }


CHECKPOINTS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "fp8": (
        blocks,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", "model.visual"],
        },
    ),
    "compressed-tensors, fp8": (
        channels,
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "compressed-tensors, 4 bits": (
        four_bits,
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
    ),
}


def write(tmp_path: Path, quantise: Quantise, config: dict[str, Any]) -> Path:
    """The embedded model, quantised in its language model's layers."""
    directory = Path(shutil.copytree(DEMO, tmp_path / "model"))
    tensors: dict[str, torch.Tensor] = {}
    for key, weight in load_file(DEMO / "model.safetensors").items():
        inside = ".language_model.layers." in key and key.endswith("_proj.weight")
        tensors |= quantise(key.removesuffix(".weight"), weight) if inside else {key: weight}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return directory


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_answers_and_takes_what_was_foreseen(tmp_path: Path, name: str):
    """compressed-tensors failed at the first question: it takes its weights apart in the first call
    of the whole model, of which the engine calls the parts.
    """
    directory = write(tmp_path, *CHECKPOINTS[name])
    loaded = load(str(directory), device="cpu")
    circle = Image.open(io.BytesIO(picture("circle", "blue", (128, 128)))).convert("RGB")
    with running(loaded) as engine:
        assert finish(engine.submit(request(circle, "what color is the shape?"))) == "blue"
    need = estimate(find(str(directory)), "auto", 1e9, cpu=False)  # as it is before it is packed
    taken = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    assert taken <= need.weights < 1.05 * taken  # the scales, which are not kept


def test_what_its_own_library_refuses_is_told(tmp_path: Path, caplog):
    """It was "an unexpected error while loading"."""
    quantise, config = CHECKPOINTS["compressed-tensors, fp8"]
    directory = write(tmp_path, quantise, config | {"config_groups": {"group_0": {"weights": 7}}})
    with pytest.raises(ModelLoadError) as error:
        load(str(directory), device="cpu")
    assert str(error.value) == (
        "weights that are quantised with compressed-tensors can't be loaded here, the log has why: "
        "take the checkpoint that is not quantised"
    )
    assert "Traceback" in caplog.text
