from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

from qwenvl_app.cli import doctor
from qwenvl_app.cli.doctor import Finding, Level
from qwenvl_app.loading import plan
from qwenvl_app.loading.checkpoint import DEMO, find
from qwenvl_app.loading.footprint import estimate
from qwenvl_app.settings import load_settings

NEED = estimate(find("demo"), "auto", 50e6)


def made(free: float, **settings: object) -> plan.Plan:
    """Of the embedded model, for a GPU with so many MiB free."""
    memory = plan.Memory([int(free * plan.MIB)], cpu=False)
    return plan.make(NEED, load_settings({}, **settings), memory)


@pytest.mark.parametrize(
    ("free", "settings", "level", "words"),
    [
        (8000, {}, Level.OK, "7.8 GiB free; weights 16 MiB, vision tower up to"),
        (
            8000,
            {"kv_cache_mb": 1},
            Level.WARN,
            "QWENVL_KV_CACHE_MB is too small for the largest request",
        ),
        (
            8000,
            {"kv_cache_mb": 9000},
            Level.FAIL,
            "QWENVL_KV_CACHE_MB does not fit beside the weights",
        ),
        (
            500,
            {},
            Level.FAIL,
            "the weights do not fit; what would fit: QWENVL_DTYPE=bfloat16, or a quant",
        ),
    ],
)
def test_memory(free: float, settings: dict[str, int], level: Level, words: str):
    """It used to say "lower KV_CACHE_MB" where that was 0, and "raise" it where it was too high."""
    found = doctor._verdict("GPU memory", made(free, **settings))
    assert found.level is level
    assert words in found.text


def test_memory_that_the_service_itself_may_hold():
    """While it ran, or the one that it replaces, the doctor said that the weights do not fit."""
    found = doctor._verdict("GPU memory", made(400), made(8000))
    assert found.level is Level.WARN
    assert "7.4 GiB are in use, perhaps by this service: stop it" in found.text


def test_memory_that_is_too_small_even_if_nobody_uses_it():
    found = doctor._verdict("GPU memory", made(100), made(500))
    assert found.level is Level.FAIL
    assert "in use" not in found.text


@pytest.mark.parametrize(("free", "level"), [(8, Level.OK), (3, Level.WARN), (1, Level.WARN)])
def test_the_machines_memory_beside_a_gpu(free: int, level: Level):
    found = doctor._host(made(8000), free * plan.GIB)
    assert found.level is level
    assert ("QWENVL_MAX_CONCURRENCY=2 fits" in found.text) is (free == 3)


def test_the_process_is_told(settings):
    """What it takes on a CPU, idle and at most; counted from what this process has already."""
    found = next(each for each in examine() if each.about == "process")
    assert re.fullmatch(
        r"about (\d+ MiB|\d\.\d GiB) when idle, and up to \d\.\d GiB at once", found.text
    )


def test_the_threads_are_those_that_will_be_used():
    """It named torch's own number, of which the service leaves one to others."""
    assert "the CPU, 3 threads" in doctor._device(load_settings({}, cpu_threads=3)).text


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
    assert "QWENVL_DEVICE" in found.text
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


def test_versions_of_a_wheel(monkeypatch, tmp_path: Path):
    """What only traces need is not missing."""
    needed = ["nowhere-1==2.0", 'nowhere-2==2.0; extra == "otel"']
    monkeypatch.setattr(doctor, "_ROOT", tmp_path)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    found = doctor._versions()
    assert found.level is Level.WARN
    assert "nowhere-1 is missing, tested with 2.0; pip" in found.text


def test_versions_that_differ_are_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.0.1")
    found = doctor._versions()
    assert found.level is Level.WARN
    assert "flask is 0.0.1, tested with" in found.text
