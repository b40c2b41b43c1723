"""Whatever fails and whoever leaves: every request ends exactly once, and the next is right."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest

from benchmarks.soak import resident
from qwenvl_app.engine import engine as engines
from qwenvl_app.engine.drawing import Rng
from qwenvl_app.engine.executor import Executor
from qwenvl_app.engine.kv_cache import SlotCache
from qwenvl_app.engine.recurrent import RecurrentCache
from qwenvl_app.engine.runner import Runner
from qwenvl_app.engine.sampling import Sampler
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.engine.vision import VisionPass
from qwenvl_app.errors import DeadlineExceeded, InternalError, Unavailable
from qwenvl_app.generation import FinishReason, question
from qwenvl_app.loading.load import load
from qwenvl_app.testing import prompt_of
from tests import families
from tests.engines import agrees, finish, generate, random_request, running, spread, until_idle

FAULTS = [
    (Runner, "begin_vision"),
    (Runner, "prefill"),
    (Runner, "decode"),
    (VisionPass, "advance"),
    (Sampler, "process"),
    (Sampler, "append"),
    (Rng, "next"),
    (SlotCache, "fit"),
    (SlotCache, "begin"),
    (SlotCache, "update"),
    (SlotCache, "move"),
    (SlotCache, "save"),
    (SlotCache, "restore"),
    (RecurrentCache, "kept"),
    (RecurrentCache, "update_recurrent_state"),
    (Executor, "restore_prefixes"),
    (Sequence, "append"),
]


@pytest.fixture(scope="module")
def wild():
    return spread(load("demo"), layers=2)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    return families.wild(tmp_path_factory.mktemp("family") / "qwen3_5", "qwen3_5")


@pytest.mark.parametrize(
    ("model", "seed"),
    [
        ("wild", 0),
        ("recurrent", 3),
        *(pytest.param("wild", seed, marks=pytest.mark.slow) for seed in (1, 2)),
    ],
)
def test_fuzz(request, monkeypatch, caplog, model: str, seed: int):
    wild = request.getfixturevalue(model)
    caplog.set_level("CRITICAL")  # thousands of tracebacks are meant
    rng = random.Random(seed)
    ends: Counter[int] = Counter()
    armed = threading.Event()
    real_finish = Sequence.finish

    def counted(self, end):
        ends[id(self)] += 1
        real_finish(self, end)

    monkeypatch.setattr(Sequence, "finish", counted)
    monkeypatch.setattr(engines, "_MAX_FAILURES", 10**9)

    def failing(real):
        def call(*arguments, **options):
            if armed.is_set() and rng.random() < 0.004:
                raise RuntimeError("injected")
            return real(*arguments, **options)

        return call

    for owner, name in FAULTS:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))

    with running(wild, slots=4, prefill_chunk=64, prefix_cache_bytes=2**22) as engine:
        armed.set()
        sequences: list[Sequence] = []
        images = [random_request(rng).images[0] for _ in range(6)]
        for number in range(60):
            options = {"temperature": rng.choice((None, 0.0, 1.0)), "seed": number}
            asked = random_request(rng, **options)
            if rng.random() < 0.5:
                asked = type(asked)(
                    question(rng.choice(images), prompt_of(asked)),
                    asked.request_id,
                    asked.sampling,
                    rng.random() < 0.5,
                    time.monotonic() + rng.random() if rng.random() < 0.3 else None,
                )
            sequences.append(engine.submit(asked))
            if rng.random() < 0.3:
                rng.choice(sequences).cancel()
            time.sleep(rng.random() * 0.01)
        outcomes: Counter[str] = Counter()
        for sequence in sequences:
            try:
                outcomes[list(sequence)[-1].finish_reason] += 1
            except (InternalError, Unavailable, DeadlineExceeded) as error:
                outcomes[type(error).__name__] += 1
        armed.clear()
        until_idle(engine)
        assert [ends[id(sequence)] for sequence in sequences] == [1] * len(sequences)
        assert outcomes[FinishReason.LENGTH]
        assert outcomes["InternalError"]
        for _ in range(4):
            asked = random_request(rng)
            sequence = engine.submit(asked)
            finish(sequence)
            assert agrees(sequence, generate(wild, asked)) is not False


def test_a_dead_engine_thread_is_never_a_hang(wild, monkeypatch):
    """Not even an error that no step foresees leaves somebody waiting."""
    rng = random.Random(1)
    with running(wild) as engine:

        def die(*_arguments):
            raise SystemExit

        monkeypatch.setattr(engine._runner, "prefill", die)
        sequence = engine.submit(random_request(rng))
        with pytest.raises(InternalError):
            list(sequence)
        with pytest.raises(InternalError):
            engine.submit(random_request(rng))
        assert "SystemExit" in engine.failure.message


@pytest.mark.slow
def test_memory_stays_where_it_was(wild):
    """300 short requests here; 10,000 in ``benchmarks/soak.py``."""
    rng = random.Random(2)
    with running(wild, slots=4, prefix_cache_bytes=2**20) as engine:

        def ask(times: int) -> None:
            for _ in range(times):
                requests = [random_request(rng, max_new_tokens=1) for _ in range(4)]
                for sequence in [engine.submit(each) for each in requests]:
                    finish(sequence)

        ask(25)
        before = resident()
        ask(50)
        assert resident() - before < 50
        assert engine.prefixes.bytes <= 2**20
