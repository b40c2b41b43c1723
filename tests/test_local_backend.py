"""The local backend with the embedded checkpoint: what is the engine's own is in test_engine.py."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing

import pytest
from PIL import Image

from qwenvl_app.backends.local import LocalBackend
from qwenvl_app.engine import engine as engines
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.errors import DeadlineExceeded, InternalError, Unavailable
from qwenvl_app.generation import FinishReason, GenerationRequest, Phase, SamplingParams, question
from qwenvl_app.loading.load import load
from qwenvl_app.settings import load_settings
from tests.engines import finish
from tests.waiting import until
from tests.wire import picture


@pytest.fixture(scope="module")
def loaded():
    return load("demo")


def own(loaded: LoadedModel) -> LoadedModel:
    """A backend keeps no weights that are in C++ as well."""
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))


@pytest.fixture
def local(loaded, monkeypatch) -> Iterator[LocalBackend]:
    monkeypatch.setattr("qwenvl_app.loading.load.load", lambda _name, **_options: own(loaded))
    backend = LocalBackend(load_settings({}))
    while backend.status().phase is Phase.LOADING:
        time.sleep(0.005)
    yield backend
    backend.close()


def ask(prompt: str, shape: str = "circle", color: str = "blue", **sampling) -> GenerationRequest:
    image = Image.open(io.BytesIO(picture(shape, color, (128, 128)))).convert("RGB")
    return GenerationRequest(question(image, prompt), "id", SamplingParams(**sampling), stream=True)


def test_deltas_end_with_a_reason_usage_and_timings(local):
    deltas = list(local.generate(ask("这张图里有什么？")))
    assert "".join(delta.text for delta in deltas) == "图中有一个蓝色的圆形。"
    assert len(deltas) > 3
    assert all(d.finish_reason is None and d.usage is None for d in deltas[:-1])
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].usage.prompt_tokens > 16
    assert deltas[-1].usage.completion_tokens >= len(deltas) - 1
    assert deltas[-1].timings.first_token > 0


def test_length(local):
    deltas = list(local.generate(ask("这张图里有什么？", max_new_tokens=2)))
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[-1].usage.completion_tokens == 2


def test_cancelled_while_it_runs(local):
    generation = local.generate(ask("描述一下这张图片。"))
    deltas = []
    for delta in generation:
        deltas.append(delta)
        generation.cancel()
    assert deltas[-1].finish_reason in (FinishReason.CANCELLED, FinishReason.STOP)
    generation.cancel()
    assert finish(local.generate(ask("what color is the shape?"))) == "blue"


def test_many_threads_each_get_their_own_answer(local):
    colors = ["red", "green", "blue", "black"] * 3
    answers: dict[int, str] = {}

    def work(number: int, color: str) -> None:
        answers[number] = finish(local.generate(ask("what color is the shape?", color=color)))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(colors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(len(colors))] == colors


def test_an_engine_that_has_failed_shows_in_the_status(local, monkeypatch):
    engine = local._engine

    def broken(*_arguments):
        raise RuntimeError("again")

    monkeypatch.setattr(engine._runner, "prefill", broken)
    for _ in range(3):
        with pytest.raises(InternalError):
            list(local.generate(ask("x")))
    while local.status().phase is Phase.READY:
        time.sleep(0.005)
    assert local.status().phase is Phase.FAILED
    assert "has to be restarted" in local.status().message
    with pytest.raises(InternalError):
        local.generate(ask("x"))


class Blockade:
    """A model whose next forward pass blocks until it is let go, as on a GPU that hangs."""

    def __init__(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch):
        runner = backend._engine._runner
        real = runner.prefill
        self.reached, self.go = threading.Event(), threading.Event()

        def prefill(*arguments):
            self.reached.set()
            assert self.go.wait(60)
            return real(*arguments)

        monkeypatch.setattr(runner, "prefill", prefill)


@pytest.fixture
def impatient(loaded, monkeypatch) -> Iterator[LocalBackend]:
    monkeypatch.setattr("qwenvl_app.loading.load.load", lambda _name, **_options: own(loaded))
    backend = LocalBackend(load_settings({}, stall_timeout_s=1.0))
    until(lambda: backend.status().phase is Phase.READY)
    yield backend
    backend.close()


def test_a_stuck_step_is_a_failure_until_it_ends(impatient, monkeypatch, caplog):
    """A GPU that hangs raises nothing: health said 200 while nobody was answered."""
    blockade = Blockade(impatient, monkeypatch)
    late = dataclasses.replace(ask("a"), deadline=time.monotonic() + 0.1)
    generation, patient = (
        impatient.generate(late),
        impatient.generate(ask("what color is the shape?")),
    )
    assert blockade.reached.wait(10)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        list(generation)
    assert time.monotonic() - began < 5  # it ended though the engine said nothing
    # The line is in the log though nobody asks for the status.
    until(lambda: "no progress" in caplog.text)
    time.sleep(0.6)
    assert [r.levelname for r in caplog.records if "progress" in r.message] == ["CRITICAL"]
    status = impatient.status()
    assert status.phase is Phase.FAILED
    assert "no progress for" in status.message
    with pytest.raises(InternalError):
        impatient.generate(ask("x"))
    blockade.go.set()
    until(lambda: impatient.status().phase is Phase.READY)
    assert finish(patient) == "blue"
    until(lambda: "progress again" in caplog.text)


def test_who_leaves_a_stuck_engine_is_let_go_at_once(local, monkeypatch):
    blockade = Blockade(local, monkeypatch)
    generation = local.generate(ask("a"))
    assert blockade.reached.wait(10)
    threading.Timer(0.05, generation.cancel).start()
    assert list(generation)[-1].finish_reason is FinishReason.CANCELLED
    for _ in range(5):  # nor do they pile up, pictures and all, until the step ends
        local.generate(ask("a")).cancel()
    assert len(local._engine._inbox) == 1
    blockade.go.set()
    assert finish(local.generate(ask("what color is the shape?"))) == "blue"


def test_closing_with_a_stuck_engine_comes_to_an_end(local, monkeypatch, caplog):
    monkeypatch.setattr(engines, "_PATIENCE_S", 0.1)
    blockade = Blockade(local, monkeypatch)
    generation = local.generate(ask("a"))
    assert blockade.reached.wait(10)
    local.close()
    assert "is left behind" in caplog.text
    assert local.status().phase is Phase.DRAINING
    blockade.go.set()
    with pytest.raises(Unavailable):
        list(generation)


def parts_of_a_closed_backend(loaded, monkeypatch) -> list[weakref.ref[object]]:
    before = gc.get_freeze_count()
    monkeypatch.setattr("qwenvl_app.loading.load.load", lambda _name, **_options: own(loaded))
    with closing(LocalBackend(load_settings({}))) as backend:
        until(lambda: backend.status().phase is Phase.READY)
        assert gc.get_freeze_count() > before
        assert backend._engine
        runner = backend._engine._runner
        return [weakref.ref(each) for each in (runner, runner._tower, runner._model)]


def test_what_is_loaded_is_left_to_no_collection_and_goes_with_its_backend(loaded, monkeypatch):
    parts = parts_of_a_closed_backend(loaded, monkeypatch)
    assert not any(part() for part in parts)


def test_closing_refuses_what_comes_after(local):
    local.close()
    local.close()
    assert local.status().phase is Phase.DRAINING
    with pytest.raises(Unavailable):
        local.generate(ask("c"))


def test_loading_tells_how_far_it_is(caplog):
    """transformers' bar was drawn with carriage returns into the log, and a probe saw nothing."""
    caplog.set_level("INFO")
    told: list[str] = []
    load("demo", say=told.append)
    tensors = [message for message in told if message.startswith("loading the weights: ")]
    assert told[0] == "looking for the checkpoint"
    assert len(tensors) > 50
    assert tensors[0].startswith("loading the weights: 0 of ")
    assert tensors[-1] == f"loading the weights: {len(tensors) - 1} of {len(tensors)} tensors"


def test_what_is_no_checkpoint_is_told_before_the_libraries_are_imported():
    """To import them takes seconds."""
    code = (
        "import os, sys, time\n"
        "from qwenvl_app.backends.local import LocalBackend\n"
        "from qwenvl_app.generation import Phase\n"
        "from qwenvl_app.settings import load_settings\n"
        "backend = LocalBackend(load_settings({}, model=os.devnull))\n"
        "while backend.status().phase is Phase.LOADING:\n"
        "    time.sleep(0.01)\n"
        "assert backend.status().message.startswith('QWENVL_MODEL is a file')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_load_is_told_in_the_status(monkeypatch):
    """The message changes, and the phase's age goes on from its beginning."""
    says = threading.Event()
    go = threading.Event()

    def slow(_name, say, **_options):
        say("half of it")
        says.set()
        assert go.wait(20)
        raise InternalError("x")

    monkeypatch.setattr("qwenvl_app.loading.load.load", slow)
    backend = LocalBackend(load_settings({}))
    began = backend.status().since
    assert says.wait(20)
    assert backend.status().phase is Phase.LOADING
    assert backend.status().message == "half of it"
    assert backend.status().since == began
    go.set()
    while backend.status().phase is Phase.LOADING:
        time.sleep(0.005)
    backend.close()
