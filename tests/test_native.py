"""A model in C++ gives the tokens of ``generate``, or is not used."""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qwenvl_app.engine import native
from qwenvl_app.engine.native import library
from qwenvl_app.engine.native.structs import Merger
from qwenvl_app.engine.runner import Runner
from qwenvl_app.loading.load import load
from tests.engines import generate, judge, random_request, running, spread, together

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="it is compiled by g++")


@pytest.fixture(scope="module")
def wild():
    return spread(load("demo"))


@pytest.fixture(scope="module")
def more(wild):
    rng = random.Random(13)
    return [(each, generate(wild, each)) for each in (random_request(rng) for _ in range(24))]


@pytest.fixture(scope="module")
def asked(wild):
    rng = random.Random(13)
    return [(each, generate(wild, each)) for each in (random_request(rng) for _ in range(10))]


def with_native(loaded, threads=(1, 1)):
    made = native.create(loaded.model, 2**30, threads)
    assert made.text and made.tower
    return dataclasses.replace(loaded, native=made)


@pytest.mark.parametrize(
    ("whose", "slots", "threads"),
    [
        ("asked", 1, (1, 1)),
        ("asked", 9, (3, 3)),
        *(
            pytest.param("more", *case, marks=pytest.mark.slow)
            for case in ((1, (1, 1)), (3, (2, 2)), (4, (1, 3)), (9, (3, 3)))
        ),
    ],
)
def test_tokens_are_those_of_generate(wild, request, whose, slots, threads):
    with running(with_native(wild, threads), slots=slots) as engine:
        pairs = together(engine, request.getfixturevalue(whose))
        assert engine._runner._native.text
    judge(pairs)


def test_a_model_that_is_taken_over_keeps_no_products_and_answers(wild, asked):
    own = dataclasses.replace(wild, model=copy.deepcopy(wild.model))
    own = with_native(own)
    own.native.take_over(own.model)
    parts = own.model.model.language_model.layers, own.model.lm_head, own.model.model.visual
    linear = [m for part in parts for m in part.modules() if isinstance(m, torch.nn.Linear)]
    assert linear
    assert not any(each.weight.numel() for each in linear)
    with running(own) as engine:
        pairs = together(engine, asked[:4])
    judge(pairs)


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("text", "_axes"),
        ("text", "text_of"),
        ("tower", "tower_of"),
        ("tower", "patch_kernel"),
        ("tower", "_merger"),
    ],
)
def test_what_computes_otherwise_is_not_used(wild, part, fault, monkeypatch, caplog):
    right = getattr(native.layout, fault)

    def wrong(*asked):
        made = right(*asked)
        if isinstance(made, torch.Tensor):
            return made.zero_()
        if isinstance(made, Merger):
            made.norm = made.norm_bias
        else:
            made.scale *= 1.01
        return made

    monkeypatch.setattr(native.layout, fault, wrong)
    made = native.create(wild.model, 2**30)
    assert getattr(made, part) is None
    assert sum(each is None for each in made) == 1
    assert "in C++ it has other" in caplog.text


def test_numbers_that_are_not_finite_stay_so(wild):
    runner = Runner(wild.model, native=with_native(wild).native)
    with torch.inference_mode():
        cache = runner.new_cache(0)
        cache.fit(2, 128)
        cache.first(2, 128)[0][1][1, :, 3] = float("nan")
        logits = runner.decode(cache, [5, 6], [9, 9], [9, 9])
    assert logits[0].isfinite().all()
    assert not logits[1].isfinite().any()


@pytest.mark.slow  # it is compiled once more
def test_a_machine_without_the_widest_registers_has_it_too(wild, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_CACHE", tmp_path)
    monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, "-mno-avx512f"))
    with_native(wild)


def test_what_there_is_no_code_or_no_room_for_is_not_made(wild):
    assert native.create(spread(load("demo")).model.to(torch.bfloat16), 2**30) == (None, None)
    assert native.create(wild.model, 2**10) == (None, None)


def test_without_a_compiler_there_is_none(wild, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.create(wild.model, 2**30) == (None, None)
    assert "with g++ installed" in caplog.text


@pytest.mark.parametrize("body", ["#!/bin/sh\necho no such flag >&2; exit 1", "#!/bin/sh\nexit 0"])
def test_nor_if_the_compiler_fails(wild, body, monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "g++"
    compiler.write_text(body)
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(library, "_CACHE", tmp_path / "cache")
    assert native.create(wild.model, 2**30) == (None, None)
    assert "the model's layers are PyTorch's" in caplog.text


def test_of_several_that_start_together_one_compiles(monkeypatch, tmp_path):
    source, calls, compiler = tmp_path / "native.cpp", tmp_path / "calls", tmp_path / "g++"
    made = "".join(f"void* new_{part}() {{ return 0; }}\n" for part in ("team", "text", "tower"))
    source.write_text(f'extern "C" {{ {made} }}')
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {shutil.which("g++")} "$@"')
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_SOURCE", source)
    monkeypatch.setattr(library, "_CACHE", tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: library.build(), range(4)))
    assert sum(str(source) in call for call in calls.read_text().splitlines()) == 1


def test_it_is_compiled_once(monkeypatch, tmp_path):
    source = tmp_path / "native.cpp"
    made = "".join(f"void* new_{part}() {{ return 0; }}\n" for part in ("team", "text", "tower"))
    source.write_text(f'extern "C" {{ {made} }}')
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_SOURCE", source)
    monkeypatch.setattr(library, "_CACHE", tmp_path / "cache")
    for _ in range(2):
        assert library.build()
    (kept,) = (tmp_path / "cache").iterdir()
    source.write_text(f'extern "C" {{ {made} }}  // another')
    assert library.build()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert kept.suffix == ".so"
    monkeypatch.setattr(library, "_CACHE", source / "cache")  # nothing can be kept there
    assert library.build()
