"""What is held of memory, in bytes, against what is charged: a GPU is pretended, which counts.

The engine, its scheduler, executor and caches are real; the model is not, so that nothing but
what they hold is counted.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from qwenvl_app.engine import engine as engines
from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.engine.inputs import Features, Inputs, Span
from qwenvl_app.engine.kv_cache import SlotCache
from qwenvl_app.engine.layout import Layout, StateShape
from qwenvl_app.engine.native import Native
from qwenvl_app.engine.recurrent import RecurrentCache
from qwenvl_app.engine.sampling import Sampler
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.generation import SamplingParams
from tests.engines import request
from tests.gpu.pretend import GPU, Gpus, pretend

LAYERS = 2
PLAIN = Layout(heads=1, head_dim=2, dtype=torch.float32, devices=(GPU,) * LAYERS)
STATES = tuple(StateShape(layer, (4, 4), (2, 8, 8), torch.float32, GPU) for layer in (0, 2))
RECURRENT = dataclasses.replace(PLAIN, states=STATES)
TOKEN = PLAIN.token_bytes
TOWER, FEATURES = 2 * TOKEN, TOKEN // 2  # of a patch
IMAGE = Image.new("RGB", (8, 8))


class Tower:
    """In ``VisionPass``'s place: what it should take, and no more."""

    def __init__(self, runner: Model, images: list[Span]):
        self._runner, self.images = runner, images
        self._hidden = bytes_of(TOWER * sum(image.patches for image in images))

    def advance(self, _first: int, last: int) -> list[Features] | None:
        self._runner.look()
        if last < self._runner.depth:
            return None
        return [Features(bytes_of(FEATURES * image.patches), []) for image in self.images]


def bytes_of(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=GPU)


class Model:
    """In ``Runner``'s place. Writes what can be told apart, and finds it again."""

    depth, merge, max_length, device = 4, 2, 10**6, torch.device("cpu")

    def __init__(self, layout: Layout, gpus: Gpus, *, compiled: bool):
        self.layout, self.compiled, self.gpus = layout, compiled, gpus
        self.running: list[Sequence] = []  # the scheduler's
        self.held: list[int] = []
        self.lost: list[str] = []

    def new_cache(self, budget: int) -> SlotCache:
        if self.layout.states:
            return RecurrentCache(self.layout)
        return SlotCache(self.layout, budget if self.compiled else 0)

    def look(self) -> None:
        self.held.append(self.gpus.allocated)

    def rehearse(self, cache: SlotCache, slots: int) -> None:
        pass

    def begin_vision(self, images: list[Span]) -> Tower:
        return Tower(self, images)

    def prefill(
        self, cache: SlotCache, sequences: list[Sequence], rows: list[int], widths: list[int]
    ) -> torch.Tensor:
        self.look()
        for sequence, row, width in zip(sequences, rows, widths, strict=True):
            ids = sequence.inputs.ids[sequence.computed : sequence.computed + width]
            self._write(cache, row, sequence.computed, ids)
        return torch.zeros(len(rows), 10)

    def decode(
        self, cache: SlotCache, ids: list[int], _positions: list[int], starts: list[int]
    ) -> torch.Tensor:
        self.look()
        for row, (token, start) in enumerate(zip(ids, starts, strict=True)):
            self._write(cache, row, start, [token])
        return torch.zeros(len(ids), 10)

    def _write(self, cache: SlotCache, row: int, start: int, ids: list[int]) -> None:
        """Into the first and the last tensor."""
        prompt = min(start, self.running[row].prompt_length)
        for tensor in (cache._keys[0], cache._values[-1]):
            written = tensor.host[row, 0, :, 0]
            if written[:prompt].tolist() != self.running[row].inputs.ids[:prompt]:
                self.lost.append(f"of row {row}")
            written[start : start + len(ids)] = torch.tensor(ids, dtype=torch.float32)


class Harness:
    """An engine whose steps are made here, not on its thread."""

    def __init__(self, engine: Engine, model: Model, gpus: Gpus):
        self.engine, self.model, self.gpus = engine, model, gpus
        model.running = engine._scheduler.running
        self._number = 0

    def submit(self, prompt: int, limit: int, patches: int, key: bytes | None = None) -> Sequence:
        self._number += 1
        # The picture comes first, so that what is kept of one fits any question about it.
        tokens = patches // 4
        first = 10**6 + int(key) if key else 1000 * self._number
        inputs = Inputs(
            list(range(first, first + prompt)),
            torch.zeros(3, prompt, dtype=torch.long),
            [Span(range(tokens), (1, 1, patches), key or b"")],
            prefix_key=key,
            boundary=tokens if key and self.model.layout.states else 0,
        )
        sampling = request(IMAGE, seed=1, max_new_tokens=limit)
        sampler = Sampler(SamplingParams(), GenerationConfig(), inputs.ids, self.model.device)
        prefix = self.engine.prefixes.get(inputs.text()) if key else None
        sequence = Sequence(sampling, inputs, sampler, limit, None, 0.0, prefix)
        self.engine._scheduler.waiting.append(sequence)
        return sequence

    def step(self) -> None:
        with torch.inference_mode():
            self.engine.step()
        self.model.look()

    def drain(self) -> None:
        while self.engine.running or self.engine.waiting:
            self.step()

    def check(self) -> None:
        """All that was held, and while the cache changed its shape one tensor more of a layer."""
        engine, layout = self.engine, self.model.layout
        options = engine._options
        most = options.kv_cache_bytes + engine.prefixes.budget
        # Of rows that only have their place in a call, see ``RecurrentCache.kept``.
        most += options.slots * sum(4 * math.prod(state.inputs) for state in layout.states)
        assert max(self.model.held) <= most, f"{max(self.model.held) / most:.2f} of it"
        once_more = engine._budget * TOKEN // (2 * LAYERS)
        once_more += options.slots * max((state.bytes for state in layout.states), default=0)
        assert self.gpus.peak <= most + once_more
        assert not self.model.lost
        assert not engine._failures


@contextmanager
def harness(kind: str, tokens: int, slots: int, prefix: int = 0) -> Iterator[Harness]:
    layout = RECURRENT if kind == "recurrent" else PLAIN
    options = EngineOptions(
        slots=slots,
        max_new_tokens=1000,
        kv_cache_bytes=layout.bytes(tokens, slots),
        prefix_cache_bytes=prefix,
        prefill_chunk=512,
        patch_tokens=(TOWER / TOKEN, FEATURES / TOKEN),
        compile="on" if kind == "roomy" else "off",
    )
    config = GenerationConfig(eos_token_id=[])
    loaded = SimpleNamespace(
        model=SimpleNamespace(generation_config=config),
        patcher=SimpleNamespace(processor=SimpleNamespace(to_dict=dict)),
        native=Native(),
        tokenizer=None,
    )
    with pretend() as gpus, gpus.here(), pytest.MonkeyPatch.context() as patched:
        model = Model(layout, gpus, compiled=options.compile == "on")
        patched.setattr(engines, "Runner", lambda _model, **_: model)
        # A thread that comes late would find requests, and make steps too.
        patched.setattr(Engine, "_run", lambda _engine: None)
        engine = Engine(loaded, options)
        try:
            yield Harness(engine, model, gpus)
        finally:
            engine.close()


KINDS = ["plain", "roomy", "recurrent"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_needs_any_more_is_given_back_before_a_large_picture_comes(kind):
    """Seven rows of 4,096 tokens, of which five end: with the tower it was 1.24 of the budget."""
    with harness(kind, 8 * 4096 + 8192, slots=8) as it:
        rows = [it.submit(4000, 96, 4) for _ in range(7)]
        while not all(row.tokens for row in rows):
            it.step()
        for row in rows[1:6]:
            row.cancel()
        it.submit(1000, 96, 11_000)
        it.drain()
        it.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prefix", "seed"),
    [
        (250 * TOKEN, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product((0, 250 * TOKEN), range(4))
            if case != (250 * TOKEN, 0)
        ),
    ],
)
def test_bytes_stay_within_the_budget_whatever_comes(kind, prefix, seed):
    rng = random.Random(seed)
    slots = rng.choice((2, 3, 5, 8))
    tokens = rng.randint(1500, 6000)
    with harness(kind, tokens, slots, prefix) as it:
        sequences: list[Sequence] = []
        while len(sequences) < 30:
            if rng.random() < 0.25:
                patches = rng.choice((4, 40, 400, rng.randint(4, 400), rng.randint(4, tokens // 3)))
                room = it.engine._scheduler.longest(patches)
                prompt = patches // 4 + rng.randint(1, 300)
                limit = min(rng.choice((1, 5, 40, 150)), room - prompt)
                if limit > 0:
                    key = rng.choice((None, b"%d" % patches)) if patches <= 400 else None
                    sequences.append(it.submit(prompt, limit, patches, key))
            if sequences and rng.random() < 0.03:
                rng.choice(sequences).cancel()
            it.step()
        it.drain()
        it.check()
        assert all(sequence._events.qsize() for sequence in sequences)
        assert not it.engine.running
        del sequences
        assert it.gpus.allocated <= it.engine.cache_bytes + it.engine.prefixes.bytes


def test_kept_pictures_give_way_when_the_memory_runs_out():
    """Before any request does: for a row that is begun with one of them, and for rows that grow."""
    with harness("plain", 8000, 4, prefix=3000 * TOKEN) as it:
        for number in range(5):
            it.submit(600, 1, 2000, b"%d" % number)
            it.drain()
        assert len(it.engine.prefixes) == 10  # a picture, and what was asked and answered
        old = it.submit(300, 500, 4)
        while len(old.tokens) < 3:
            it.step()
        new = it.submit(600, 5, 2000, b"3")
        with it.gpus.limit(200 * TOKEN):
            it.drain()
        assert (len(old.tokens), len(new.tokens), new.cached) == (500, 5, 599)
        assert len(it.engine.prefixes) <= 3  # what the new one held, it had to have; and its answer
        it.check()


def test_a_picture_that_there_is_no_memory_to_keep_is_answered(monkeypatch):
    """Its logits were there, and all running requests ended."""
    with harness("plain", 4000, 4, prefix=1000 * TOKEN) as it:
        old = it.submit(300, 200, 4)
        while len(old.tokens) < 3:
            it.step()
        real = it.engine._executor.cache.save

        def save(row: int, length: int, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            with it.gpus.limit((length - start) * TOKEN // 2):
                return real(row, length, start)

        monkeypatch.setattr(it.engine._executor.cache, "save", save)
        new = it.submit(300, 20, 1000, b"5")
        it.drain()
        assert (len(old.tokens), len(new.tokens)) == (200, 20)
        assert len(it.engine.prefixes) == 0
        it.check()
