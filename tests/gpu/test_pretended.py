"""The engine on a GPU that is not there: all is on its device, and little is waited for."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from PIL import Image

from qwenvl_app.engine.engine import Engine
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.generation import Constraint, GenerationRequest
from qwenvl_app.loading.checkpoint import FAMILIES, find
from qwenvl_app.loading.footprint import estimate
from qwenvl_app.loading.measuring import measure
from tests import families
from tests.engines import OPTIONS, finish, generate, judge, random_request, request
from tests.engines import running as cpu_running
from tests.gpu.pretend import GPU, Gpus
from tests.waiting import until

SECOND = torch.device("cuda", 1)


def moved(loaded: LoadedModel, gpus: Gpus, dtype: torch.dtype = torch.float32) -> LoadedModel:
    model = copy.deepcopy(loaded.model).to(dtype)
    with gpus.here():
        gpus.move(model)
    return dataclasses.replace(loaded, model=model)


@contextmanager
def running(gpus: Gpus, loaded: LoadedModel, **options: int) -> Iterator[Engine]:
    """An engine; afterwards known pictures are left, their shapes, and the least KV cache."""
    with gpus.here():
        engine = Engine(loaded, dataclasses.replace(OPTIONS, **options))
    cache = engine._executor.cache
    floor = cache._floor * cache.layout.token_bytes  # more of it for graphs, which stays
    most = gpus.allocated + max(3 * 2**20, floor)
    try:
        yield engine
        until(
            lambda: not engine.running and gpus.allocated <= most + engine.prefixes.bytes,
            said=lambda: f"{gpus.allocated - most} bytes too many",
        )
    finally:
        engine.close()


def answered(engine: Engine, asked: list[GenerationRequest]) -> list[Sequence]:
    sequences = [engine.submit(each) for each in asked]
    for sequence in sequences:
        finish(sequence)
    return sequences


@pytest.mark.parametrize(
    ("attention", "chunk", "prefix"),
    [
        ("sdpa", 50, 2**26),
        pytest.param("sdpa", 1024, 0, marks=pytest.mark.slow),
        pytest.param("eager", 1024, 0, marks=pytest.mark.slow),
    ],
)
def test_every_token_is_that_of_generate(wild, gpus, attention, chunk, prefix):
    rng = random.Random(11)
    asked = [random_request(rng, max_new_tokens=12) for _ in range(6)]
    again = asked[:2] if prefix else []
    loaded = moved(wild, gpus)
    loaded.model.set_attn_implementation(attention)
    with running(gpus, loaded, prefill_chunk=chunk, prefix_cache_bytes=prefix) as engine:
        sequences = answered(engine, asked) + answered(engine, again)
        assert engine.prefixes.hits == len(again)
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked + again, strict=True)])


@pytest.mark.parametrize(
    "family",
    [
        family
        if family == "qwen3_5"  # qwen3_vl is what all others here are about
        else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ],
)
# Recurrent layers take a chunk of any size in 64 steps each.
@pytest.mark.parametrize("chunk", [200, pytest.param(50, marks=pytest.mark.slow)])
def test_every_family(gpus, family, chunk, tmp_path):
    wild = families.wild(tmp_path / family, family)
    asked = [random_request(random.Random(n), max_new_tokens=8) for n in range(4)]
    with running(gpus, moved(wild, gpus), prefill_chunk=chunk) as engine:
        sequences = answered(engine, asked)
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked, strict=True)])


def test_in_bfloat16_what_the_vision_tower_makes_fits_the_language_model(wild, gpus):
    asked = [random_request(random.Random(2), max_new_tokens=4) for _ in range(2)]
    with running(gpus, moved(wild, gpus, torch.bfloat16)) as engine:
        assert all(len(sequence.tokens) == 4 for sequence in answered(engine, asked))
        assert engine._executor.cache.layout.dtype is torch.bfloat16


def test_layers_on_two_gpus(wild, gpus, monkeypatch):
    """As accelerate lays them out: its hooks bring what a layer takes to the layer's device."""
    loaded = moved(wild, gpus)

    class Align(AlignDevicesHook):
        def init_hook(self, module):
            return module  # is there already

    text = loaded.model.model.language_model
    with gpus.here():
        for part in (*text.layers[1:], text.norm, loaded.model.lm_head):
            part.to("cpu")
            gpus.move(part, SECOND)
    for part in (*text.layers[1:], text.norm, loaded.model.lm_head):
        add_hook_to_module(part, Align(execution_device=SECOND))
    asked = [random_request(random.Random(n), max_new_tokens=8) for n in range(4)]
    with running(gpus, loaded, prefill_chunk=50) as engine:
        assert [d.index for d in engine._runner.layout.devices] == [0, 1]
        sequences = answered(engine, asked)
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked, strict=True)])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _gpu: gpus.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _gpu: gpus.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _gpu: gpus.restart())
    with gpus.here():
        need, shares = measure(loaded, estimate(find("demo"), "auto", 1e6, cpu=False), 50)
    assert shares == {GPU: 0.5, SECOND: 0.5}  # of the KV cache, which plan.py divides so
    assert list(shares) == [GPU, SECOND]
    assert need.tower > need.features > 0


def test_drawing_with_penalties_and_seeds(wild, gpus):
    """A request's thread touches no GPU: while a graph is captured that would spoil the capture."""
    image = Image.new("RGB", (64, 64), "red")
    options = {
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "ignore_eos": True,
        "max_new_tokens": 10,
    }
    asked = [request(image, seed=seed, **options) for seed in (1, 1, 2)]
    with running(gpus, moved(wild, gpus)) as engine:
        first, same, other = (sequence.tokens for sequence in answered(engine, asked))
    assert first == same != other


def test_a_token_costs_few_waits(wild, gpus):
    """Each wait leaves the GPU without work for as long as the next kernels take to be launched."""
    image = Image.new("RGB", (64, 64), "red")

    def waits(**sampling: float) -> float:
        options = {"ignore_eos": True, "max_new_tokens": 16, "stream": True, **sampling}
        sequences = [engine.submit(request(image, **options)) for _ in range(2)]
        answers = [iter(sequence) for sequence in sequences]
        for answer in answers:
            next(answer)
        before, steps = sum(gpus.waits.values()), engine.steps
        for sequence in sequences:
            finish(sequence)
        return (sum(gpus.waits.values()) - before) / (engine.steps - steps)

    with running(gpus, moved(wild, gpus)) as engine:
        # Five small copies before the first layer's attention, and one look at all tokens.
        assert waits() <= 7
        # However they are picked: none of their own for those that are drawn or penalised.
        assert waits(temperature=0.7, top_p=0.8, top_k=20) <= 7
        assert waits(temperature=1.0, top_k=0, top_p=0.9, repetition_penalty=1.1) <= 7


def test_layers_of_the_vision_tower_wait_for_nothing(wild, gpus):
    """Each asked the GPU three times how long the pictures are."""
    with running(gpus, moved(wild, gpus)) as engine:
        answered(engine, [request(Image.new("RGB", (96, 64)), max_new_tokens=1)])
        before = sum(gpus.waits.values())
        answered(engine, [request(Image.new("RGB", (64, 96)), max_new_tokens=1)])
        assert sum(gpus.waits.values()) - before <= 26


def test_the_figures_of_the_gpus_are_told(wild, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: gpus.allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: gpus.peak)
    properties = SimpleNamespace(total_memory=gpus.total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    with running(gpus, moved(wild, gpus)) as engine:
        answered(engine, [request(Image.new("RGB", (64, 64)), max_new_tokens=1)])
        figures = engine.stats().gpu_memory
    assert figures[0, "allocated"] > 12 * 2**20
    assert figures[0, "total"] == 2**40


def test_what_a_gpu_refuses_is_refused(gpus):
    """The pretence is worth something: these fail on CUDA, and pass on a CPU."""
    with gpus.here():
        there = torch.ones(3, device=GPU)
        for wrong in (
            lambda: there + torch.ones(3),
            lambda: torch.cat([there, torch.ones(3)]),
            lambda: torch.ones(3)[torch.zeros(2, dtype=torch.long, device=GPU)],
            lambda: there + torch.ones(3, device=SECOND),
            lambda: there.exponential_(generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError):
                wrong()
        assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number of the host is taken
    with pytest.raises(RuntimeError, match="thread"):
        there + 1


def test_answers_held_to_a_schema_are_those_of_the_cpu(wild, gpus):
    """What is allowed is found out on the CPU, and goes to the device in one copy a step."""
    schema = {"type": "array", "items": {"enum": ["红色", 7, None]}, "minItems": 3, "maxItems": 9}
    bound = dataclasses.replace(
        request(Image.new("RGB", (64, 64), "red"), max_new_tokens=80),
        constraint=Constraint("json", schema),
    )
    asked = [bound, random_request(random.Random(2), max_new_tokens=12), bound]
    with cpu_running(wild) as engine:
        expected = [sequence.tokens for sequence in answered(engine, asked)]
    with running(gpus, moved(wild, gpus)) as engine:
        assert [sequence.tokens for sequence in answered(engine, asked)] == expected
