"""A compiled decode step gives the tokens of ``generate``, and few shapes serve many steps."""

from __future__ import annotations

import functools
import random
import shutil
from itertools import product

import pytest
import torch

from qwenvl_app.backends.local import LocalBackend
from qwenvl_app.engine import compiled
from qwenvl_app.engine.fused import fuse
from qwenvl_app.engine.kv_cache import BLOCK, SlotCache
from qwenvl_app.engine.layout import Layout
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.errors import InternalError
from qwenvl_app.generation import GenerationRequest, Phase
from qwenvl_app.loading.load import load
from qwenvl_app.settings import load_settings
from tests.engines import Solo, agrees, generate, random_request, running, spread, together
from tests.test_model_loading import wait_for

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++"),
    pytest.mark.timeout(600),  # to compile takes a minute, and more on a busy machine
]

Asked = tuple[LoadedModel, list[tuple[GenerationRequest, Solo]]]


class Replayed:
    """A CUDA graph as far as there can be one without a GPU.

    It is bound to the tensors that it was recorded with, and says what lies in them later on.
    """

    made = 0

    pool = None

    def __init__(self, body, inputs, keys, values, _pool):
        Replayed.made += 1
        self._body, self._inputs, self._keys, self._values = body, inputs.clone(), keys, values

    def replay(self, inputs):
        self._inputs.copy_(inputs)
        return self._body(self._inputs, self._keys, self._values)


def answered(layers: int, count: int) -> Asked:
    """A model as it is compiled, and ``count`` requests with what ``generate`` answered before."""
    wild = spread(load("demo"), layers=layers)
    rng = random.Random(11)
    requests = [random_request(rng) for _ in range(count)]
    pairs = [(each, generate(wild, each)) for each in requests]
    fuse(wild.model)
    return wild, pairs


@pytest.fixture(scope="module")
def asked() -> Asked:
    return answered(layers=4, count=40)


@pytest.fixture(scope="module")
def few() -> Asked:
    return answered(layers=2, count=8)


@pytest.mark.parametrize(
    ("slots", "recorded"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in product((4, 1, 16), (False, True))],
)
def test_compiled_tokens_are_those_of_generate(asked, slots, recorded, monkeypatch):
    if recorded:
        monkeypatch.setattr(compiled, "Graph", Replayed)
        monkeypatch.setattr(compiled, "_records", lambda _device: True)
        monkeypatch.setattr(Replayed, "made", 0)
    wild, requests = asked
    with running(wild, slots=slots, compile="on") as engine:
        pairs = together(engine, requests)
        steps, versions = engine.steps, engine._executor.cache.version
    verdicts = [agrees(sequence, solo) for sequence, solo in pairs]
    assert False not in verdicts
    assert verdicts.count(None) <= 1
    if recorded:  # at most one for each number of rows, each time that the cache moved
        assert 0 < Replayed.made <= versions * slots.bit_length() < steps


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_graph_outlives_the_cache_that_it_was_recorded_on(few, backend, monkeypatch):
    """Each failing step makes a new cache, which once counted its versions from 0 again.

    Its third was then taken for the old one's third, and graphs wrote to memory given back.
    ``eager`` traces as inductor has it traced, and leaves out the C++ compiler's half minute.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiled, "Graph", Replayed)
    monkeypatch.setattr(compiled, "_records", lambda _device: True)
    monkeypatch.setattr(Replayed, "made", 0)
    wild, requests = few
    with running(wild, slots=4, compile="on") as engine:
        for _ in range(3):
            pairs = together(engine, requests)
            assert False not in [agrees(sequence, solo) for sequence, solo in pairs]
            with monkeypatch.context() as patched:
                patched.setattr(engine._runner, "prefill", lambda *_: 1 / 0)
                with pytest.raises(InternalError):
                    list(engine.submit(requests[0][0]))
        assert Replayed.made


@pytest.mark.parametrize(
    ("rows", "tokens", "sides"),
    [
        (1, 1, (2, BLOCK)),
        (3, 2 * BLOCK + 1, (4, 4 * BLOCK)),
        (4, 4 * BLOCK, (4, 4 * BLOCK)),
        (5, 2 * BLOCK, (8, 2 * BLOCK)),
        (17, BLOCK, (17, BLOCK)),  # 32 rows would be more than there is room for
        (3, 5 * BLOCK, (3, 5 * BLOCK)),
    ],
)
def test_a_roomy_cache_has_sides_of_powers_of_two_within_its_budget(rows, tokens, sides):
    layout = Layout(1, 1, torch.float32, (torch.device("cpu"),))
    cache = SlotCache(layout, roomy=16 * BLOCK)
    cache.fit(rows, tokens)
    keys, _ = cache.first(rows, cache.length)
    assert (cache.slots, keys[0].shape[2]) == sides
    version = cache.version
    cache.fit(rows, tokens)
    assert cache.version == version
    cache.fit(0, 0)
    assert cache.bytes <= 4 * BLOCK * layout.token_bytes


def test_without_a_compiler_the_start_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    backend = LocalBackend(load_settings({}, compile="on"))
    wait_for(backend, Phase.FAILED)
    assert backend.status().message == (
        "QWENVL_COMPILE=on needs a C++ compiler: install g++, or set QWENVL_COMPILE=off"
    )
    backend.close()
