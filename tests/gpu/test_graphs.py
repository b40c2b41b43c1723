"""``compile = "auto"`` on a pretended GPU: what is recorded when, and what if that goes wrong.

That nothing in a recorded step waits for the GPU or copies to it is judged by ``pretend.Recorded``.

CUDA graphs themselves are tested by ``test_compiled.py``, on a real one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests import families
from tests.engines import generate, judge, random_request, request
from tests.engines import running as cpu_running
from tests.gpu.pretend import Recorded
from tests.gpu.test_pretended import answered, moved, running


def asked(count: int = 8):
    return [random_request(random.Random(n), max_new_tokens=12) for n in range(count)]


def test_steps_of_the_usual_rows_are_recorded_before_the_first_request(wild, gpus):
    with running(gpus, moved(wild, gpus), compile="auto") as engine:
        first = answered(engine, asked(1))
        usual = [(rows, columns) for rows in (1, 2, 4) for columns in (2048, 1024, 512)]
        assert gpus.recorded == usual
        assert engine._executor.cache.slots == 4
        before = gpus.replays
        sequences = first + answered(engine, asked())
        assert gpus.recorded == usual  # the cache has stayed where it was
        assert gpus.replays > before + 10
    judge(
        [(s, generate(wild, each)) for s, each in zip(sequences, asked(1) + asked(), strict=True)]
    )


def test_a_graph_looks_at_what_is_in_use_and_no_further(wild, gpus):
    """An answer that passes 512 tokens is begun with one graph and ended with another."""
    long = request(
        Image.new("RGB", (64, 64), "red"), "图" * 480, max_new_tokens=40, ignore_eos=True
    )
    with running(gpus, moved(wild, gpus), compile="auto") as engine:
        answered(engine, asked(1))
        compiled = engine._runner.compiled
        used = []
        for columns in (512, 1024, 2048):
            graph = compiled.graphs[1, columns]
            compiled.graphs[1, columns] = SimpleNamespace(
                replay=lambda inputs, graph=graph, columns=columns: (
                    used.append(columns) or graph.replay(inputs)
                )
            )
        sequence = answered(engine, [long])[0]
        assert list(dict.fromkeys(used)) == [512, 1024]
    judge([(sequence, generate(wild, long))])


def test_where_the_cache_moves_steps_are_recorded_again(wild, gpus):
    """At 4 slots of 128 tokens, which is less than most of these need."""
    loaded = moved(wild, gpus)
    with running(gpus, loaded, compile="auto", kv_cache_bytes=2**22) as engine:
        sequences = answered(engine, asked())
        versions = engine._executor.cache.version
        assert 3 < len(gpus.recorded) <= 3 * versions
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked(), strict=True)])


def test_layers_that_keep_a_state_are_eager(gpus, tmp_path):
    loaded = moved(families.wild(tmp_path / "qwen3_5", "qwen3_5"), gpus)
    with running(gpus, loaded, compile="auto") as engine:
        assert engine._runner.compiled is None


def refuse(error: Exception) -> Callable[..., torch.Tensor]:
    def method(*_: object) -> torch.Tensor:
        raise error

    return method


def replay_badly(graph: Recorded, inputs: torch.Tensor) -> torch.Tensor:
    logits = replay(graph, inputs)
    logits[-1] = logits[-1].flip(0)
    return logits


replay = Recorded.replay


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("__init__", refuse(RuntimeError("not permitted when stream is capturing"))),
        ("__init__", refuse(torch.OutOfMemoryError())),
        ("replay", replay_badly),
    ],
    ids=["refused", "no memory", "wrong logits"],
)
def test_what_goes_wrong_leaves_eager_steps(
    wild, gpus, method, fault, monkeypatch, caplog, request
):
    monkeypatch.setattr(Recorded, method, fault)
    with running(gpus, moved(wild, gpus), compile="auto") as engine:
        sequences = answered(engine, asked(4))
        decode = engine._runner.compiled
        assert not decode.graphs
        assert decode.failures == ("no memory" not in request.node.name)
        assert "CUDA graph" in caplog.text
    judge([(s, generate(wild, each)) for s, each in zip(sequences, asked(4), strict=True)])


def test_a_cpu_is_eager(wild):
    with cpu_running(wild, compile="auto") as engine:
        assert engine._runner.compiled is None
