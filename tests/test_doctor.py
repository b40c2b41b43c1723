from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from qwenvl_app import doctor
from qwenvl_app.doctor import Finding, Level
from qwenvl_app.engine.model import Runner
from qwenvl_app.loading.checkpoint import DEMO
from qwenvl_app.loading.footprint import Footprint, measure
from qwenvl_app.loading.load import load
from qwenvl_app.settings import load_settings

GIB = 2**30
BIG = 178e6


def test_the_embedded_model_takes_what_was_foreseen():
    """Parameters, bytes and the KV cache's token, against the loaded model itself."""
    model = load("demo").model
    need = measure(DEMO, "auto", BIG)
    parameters = sum(p.numel() for p in model.parameters())
    assert need.parameters == parameters
    assert need.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert need.kv_token == Runner(model).layout.token_bytes
    assert need.dtype == "float32"
    assert need.picture_tokens == 16
    half = measure(DEMO, "bfloat16", BIG)
    assert (half.weights, half.kv_token) == (need.weights // 2, need.kv_token // 2)


def test_an_8b_model_takes_what_the_readme_says(tmp_path: Path):
    """17.5 GB of weights and 144 KiB a token: from the configuration and the files' headers."""
    config = {
        "text_config": {
            "dtype": "bfloat16",
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "num_attention_heads": 32,
            "hidden_size": 4096,
            "head_dim": 128,
            "max_position_embeddings": 262144,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "patch_size": 16,
            "spatial_merge_size": 2,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": 16777216}}')
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for number in (1, 2):
        header = {"__metadata__": {}, "a": {"dtype": "BF16", "shape": [1000, 4_383_562]}}
        data = json.dumps(header).encode()
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data)
    need = measure(tmp_path, "auto", 50e6)
    assert need.weights == 17_534_248_000
    assert need.kv_token == 144 * 1024
    assert need.picture_tokens == 16384  # what the processor makes of the largest picture
    assert 1 * GIB < need.vision < 4 * GIB
    assert need.kv(4, 1024) == 4 * (16384 + 1000 + 1024) * 144 * 1024


NEED = Footprint(1, "bfloat16", 16 * GIB, 2**17, 2**18, 16384, 2 * GIB)


@pytest.mark.parametrize(
    ("free", "changes", "level", "words"),
    [
        (60, {}, Level.OK, "2.0 GiB, known pictures 0.5 GiB"),
        (24, {}, Level.OK, "wait for one another"),
        (20.9, {}, Level.WARN, "together too much: KV_CACHE_MB=2301 to 2457 would fit"),
        (21, {"kv_cache_mb": 1000}, Level.WARN, "not fit: KV_CACHE_MB=2301 to 2560 would"),
        (20.5, {}, Level.WARN, "too much: KV_CACHE_MB=2301 and PREFIX_CACHE_MB=259 would fit"),
        (19, {}, Level.WARN, "not fit: MAX_IMAGE_MEGAPIXELS below 16.8 refuses larger pictures"),
        (24, {"kv_cache_mb": 7000}, Level.FAIL, "too much: KV_CACHE_MB=2301 to 5632 would"),
        (15, {}, Level.FAIL, "the weights do not fit: take a smaller checkpoint or more memory"),
    ],
)
def test_memory(free: float, changes: dict[str, int], level: Level, words: str):
    """It used to say "lower KV_CACHE_MB" where that was 0, and "raise" it where it was too high."""
    size = int(free * GIB)
    found = doctor._fits("GPU memory", load_settings({}, **changes), NEED, size, size)
    assert found.level is level
    assert words in found.text


@pytest.mark.parametrize(("free", "total"), [(2, 60), (20.5, 60), (2, 20.5)])
def test_memory_that_the_service_itself_may_hold(free: float, total: float):
    """While it ran, or the one that it replaces, the doctor said that the weights do not fit."""
    found = doctor._fits("GPU memory", load_settings({}), NEED, int(free * GIB), int(total * GIB))
    assert found.level is Level.WARN
    assert f"{total - free:.1f} GiB are in use, perhaps by this service: stop it" in found.text


def test_memory_that_is_too_small_even_if_nobody_uses_it():
    found = doctor._fits("GPU memory", load_settings({}), NEED, 2 * GIB, 15 * GIB)
    assert found.level is Level.FAIL
    assert "in use" not in found.text


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        found = doctor._port(f"127.0.0.1:{port}")
    assert found.level is Level.FAIL
    assert "Address already in use" in found.text
    assert f"sport = :{port}" in found.text
    assert doctor._port(f"127.0.0.1:{port}").level is Level.OK


@pytest.mark.parametrize("bind", ["nonsense", "127.0.0.1:99999", "[::1"])
def test_an_address_that_is_none(bind: str):
    assert doctor._port(bind).level is Level.FAIL


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there():
    found = doctor._device(load_settings({}, device="cuda:1"))
    assert found.level is Level.FAIL
    assert "DEVICE" in found.text
    assert doctor._device(load_settings({}, model="x")).level is Level.WARN
    assert doctor._device(load_settings({}, device="cpu", model="x")).level is Level.OK


def examine(**settings: object) -> list[Finding]:
    return list(doctor.examine(load_settings({}, **settings), "127.0.0.1:0"))


def test_a_configuration_that_lacks_something(tmp_path: Path):
    directory = tmp_path / "model"
    shutil.copytree(DEMO, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["vision_config"]
    (directory / "config.json").write_text(json.dumps(config))
    last = examine(model=str(directory))[-1]
    assert last.level is Level.FAIL
    assert "vision_config" in last.text


def test_versions_that_differ_are_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.0.1")
    found = doctor._versions()
    assert found.level is Level.WARN
    assert "flask is 0.0.1, tested with" in found.text
