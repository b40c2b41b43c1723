"""A decode step in C++ gives the tokens of ``generate``, or is not used."""

from __future__ import annotations

import dataclasses
import random
import shutil

import pytest
import torch

from qwenvl_app.engine import native
from qwenvl_app.loading.load import load
from tests.engines import agrees, finish, generate, judge, random_request, running, spread, together

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="it is compiled by g++")


@pytest.fixture(scope="module")
def wild():
    return spread(load("demo"))


@pytest.fixture(scope="module")
def asked(wild):
    rng = random.Random(13)
    return [(each, generate(wild, each)) for each in (random_request(rng) for _ in range(24))]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory, monkeypatch):
    """One for all of these tests."""
    monkeypatch.setattr(native, "_CACHE", tmp_path_factory.getbasetemp() / "native")


def with_native(loaded, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    made = native.create(loaded.model, 2**30)
    torch.set_num_threads(before)
    assert made
    return dataclasses.replace(loaded, native=made)


@pytest.mark.parametrize(("slots", "threads"), [(1, 1), (3, 2), (4, 1), (9, 3)])
def test_tokens_are_those_of_generate(wild, asked, slots, threads):
    with running(with_native(wild, threads), slots=slots) as engine:
        pairs = together(engine, asked)
        assert engine._runner._native
    judge(pairs)


def test_a_step_whose_logits_are_not_the_models_is_not_used(wild, asked, caplog):
    other = with_native(spread(load("demo"), layers=3))
    wrong = dataclasses.replace(wild, native=other.native)
    with running(wrong) as engine:
        sequence = engine.submit(asked[0][0])
        finish(sequence)
        assert not engine._runner._native
    assert agrees(sequence, asked[0][1])
    assert "those in C++ have other logits" in caplog.text


def test_numbers_that_are_not_finite_stay_so(wild):
    step = with_native(wild).native
    runner = running(wild)
    with runner as engine, torch.inference_mode():
        cache = engine._runner.new_cache(0)
        cache.fit(2, 128)
        cache.first(2, 128)[0][1][1, :, 3] = float("nan")
        logits = step(cache, [5, 6], [9, 9], [9, 9])
    assert logits[0].isfinite().all()
    assert not logits[1].isfinite().any()


def test_what_there_is_no_code_or_no_room_for_is_not_made(wild):
    assert native.create(spread(load("demo")).model.to(torch.bfloat16), 2**30) is None
    assert native.create(wild.model, 2**10) is None


def test_without_a_compiler_there_is_none(wild, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.create(wild.model, 2**30) is None
    assert "with g++ installed" in caplog.text


@pytest.mark.parametrize("body", ["#!/bin/sh\necho no such flag >&2; exit 1", "#!/bin/sh\nexit 0"])
def test_nor_if_the_compiler_fails(wild, body, monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "g++"
    compiler.write_text(body)
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "_CACHE", tmp_path / "cache")
    assert native.create(wild.model, 2**30) is None
    assert "decode steps are PyTorch's" in caplog.text


def test_it_is_compiled_once(wild, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_CACHE", tmp_path / "cache")
    for _ in range(2):
        with_native(wild)
    (made,) = (tmp_path / "cache").iterdir()
    assert made.suffix == ".so"
    monkeypatch.setattr(native, "_CACHE", tmp_path / "file" / "cache")
    (tmp_path / "file").touch()  # nothing can be kept there
    with_native(wild)
