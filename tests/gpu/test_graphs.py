"""``compile = "auto"`` on a pretended GPU: what is recorded when, and what if that goes wrong.

CUDA graphs themselves are tested by ``test_compiled.py``, on a real one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from qwenvl_app.engine import compiled
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.loading.load import load
from tests import families
from tests.engines import generate, judge, random_request, spread
from tests.engines import running as cpu_running
from tests.gpu.pretend import Gpus, pretend
from tests.gpu.test_pretended import answered, moved, running


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    return spread(load("demo"), layers=2)


@pytest.fixture
def gpus() -> Iterator[Gpus]:
    with pretend() as gpus:
        yield gpus


@pytest.fixture
def recorder(gpus, monkeypatch) -> type:
    """In ``Graph``'s place: bound to the tensors that it was made with, as a graph is."""

    class Recorder:
        pool = None
        made: ClassVar[list[int]] = []  # rows
        replays = 0
        off = 0.0  # added to a logit

        def __init__(self, body, inputs, keys, values, _pool):
            self._call = body, inputs.clone(), keys, values
            before = sum(gpus.waits.values())
            self.run()
            # To wait for the GPU, or to copy to it, is no part of a graph: CUDA refuses it.
            assert sum(gpus.waits.values()) == before
            Recorder.made.append(inputs.shape[1])

        def run(self) -> torch.Tensor:
            body, *arguments = self._call
            return body(*arguments)

        def replay(self, inputs):
            Recorder.replays += 1
            self._call[1].copy_(inputs)
            logits = self.run()
            logits[-1] = (
                logits[-1] + torch.arange(logits.shape[-1], device=logits.device) * self.off
            )
            return logits

    monkeypatch.setattr(compiled, "Graph", Recorder)
    return Recorder


def asked(count: int = 8):
    return [random_request(random.Random(n), max_new_tokens=12) for n in range(count)]


def test_steps_of_the_usual_rows_are_recorded_before_the_first_request(wild, gpus, recorder):
    with running(gpus, moved(wild, gpus), compile="auto") as engine:
        first = answered(engine, asked(1))
        assert recorder.made == [1, 2, 4]
        assert engine._executor.cache.slots == 4
        replays = recorder.replays
        sequences = first + answered(engine, asked())
        assert recorder.made == [1, 2, 4]  # the cache has stayed where it was
        assert recorder.replays > replays + 10
    judge(
        [(s, generate(wild, each)) for s, each in zip(sequences, asked(1) + asked(), strict=True)]
    )


def test_where_the_cache_moves_steps_are_recorded_again(wild, gpus, recorder):
    """At 4 slots of 128 tokens, which is less than most of these need."""
    loaded = moved(wild, gpus)
    with running(gpus, loaded, compile="auto", kv_cache_bytes=2**22) as engine:
        sequences = answered(engine, asked())
        versions = engine._executor.cache.version
        assert 3 < len(recorder.made) <= 3 * versions
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked(), strict=True)])


def test_layers_that_keep_a_state_are_eager(gpus, tmp_path):
    loaded = moved(families.wild(tmp_path / "qwen3_5", "qwen3_5"), gpus)
    with running(gpus, loaded, compile="auto") as engine:
        assert engine._runner.compiled is None


@pytest.mark.parametrize("fault", ["no CUDA", "wrong logits", "no memory"])
def test_what_goes_wrong_leaves_eager_steps(wild, gpus, fault, monkeypatch, caplog, request):
    if fault == "wrong logits":
        request.getfixturevalue("recorder").off = 0.05
    if fault == "no memory":

        def refuse(*_):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(compiled, "Graph", refuse)
    with running(gpus, moved(wild, gpus), compile="auto") as engine:
        sequences = answered(engine, asked(4))
        decode = engine._runner.compiled
        assert not decode.graphs
        assert decode.failures == (fault != "no memory")
        assert "CUDA graph" in caplog.text
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked(4), strict=True)])


def test_a_cpu_is_eager(wild):
    with cpu_running(wild, compile="auto") as engine:
        assert engine._runner.compiled is None
