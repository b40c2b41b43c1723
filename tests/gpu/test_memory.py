"""What is estimated and measured of a GPU's memory against what torch allocates there.

Without a GPU one is pretended, which counts the bytes of all tensors that live on it.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.engine.inputs import prepare
from qwenvl_app.engine.kv_cache import SlotCache
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.runner import Runner
from qwenvl_app.errors import ModelLoadError, Unavailable
from qwenvl_app.loading import devices, footprint, measuring, plan
from qwenvl_app.loading.checkpoint import find
from qwenvl_app.loading.load import load
from qwenvl_app.settings import load_settings
from tests import real_shape
from tests.engines import OPTIONS, finish, request
from tests.gpu.conftest import Tell
from tests.gpu.meter import Cuda, Meter
from tests.gpu.pretend import pretend
from tests.waiting import until


@dataclasses.dataclass
class Measured:
    loaded: LoadedModel
    runner: Runner
    meter: Meter
    directory: Path
    weights: int

    def predicted(self, pixels: int) -> footprint.Footprint:
        return footprint.estimate(find(str(self.directory)), "auto", pixels, cpu=False)


@pytest.fixture(scope="module")
def measured(device, tmp_path_factory) -> Iterator[Measured]:
    """A vision tower of the real width, and on a GPU all else too."""
    width = 4096 if device.type == "cuda" else 128
    folder = tmp_path_factory.mktemp("memory") / "shape"
    try:
        directory = real_shape.make(folder, width=width, depth=3, tower=4096)
    except OSError as error:
        pytest.skip(str(error))
    if device.type == "cuda":
        cuda = Cuda(device)
        before = cuda.allocated
        loaded = load(str(directory), device="cuda")
        weights = cuda.allocated - before
        yield Measured(loaded, Runner(loaded.model), cuda, directory, weights)
        return
    loaded = load(str(directory), device="cpu")
    with pretend() as gpus:
        with gpus.here():
            gpus.move(loaded.model)
            weights = gpus.allocated
            runner = Runner(loaded.model)
        yield Measured(loaded, runner, gpus, directory, weights)


def test_weights(measured, tell: Tell):
    predicted = measured.predicted(2**20).weights
    tell(f"{measured.weights / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f}")
    assert measured.weights == pytest.approx(predicted, rel=0.02)


def test_the_kv_cache(measured, tell: Tell):
    """All of it, and while it grows one layer's keys once more."""
    meter, need = measured.meter, measured.predicted(2**20)
    layout = measured.runner.layout
    assert need.kv_token == layout.token_bytes
    with meter.here(), torch.inference_mode():
        before = meter.allocated
        cache = SlotCache(layout)
        cache.fit(4, 1000)
        assert cache.bytes == 4 * 1024 * need.kv_token
        assert meter.allocated - before == pytest.approx(cache.bytes, rel=0.02)
        meter.restart()
        cache.fit(4, 2000)
        grown = cache.bytes
        tell(f"{(meter.peak - before) / 2**20:.1f} MiB while growing to {grown / 2**20:.1f}")
        assert meter.peak - before <= grown * (1 + 1 / len(layout.devices))
        cache.fit(0, 0)
        assert meter.allocated == before


def test_the_vision_tower(measured, tell: Tell):
    """From the pixels to what the language model takes."""
    meter, runner = measured.meter, measured.runner
    image = Image.effect_noise((1024, 512), 90).convert("RGB")
    small = image.crop((0, 0, 256, 256))
    [first], [span] = (
        prepare(measured.loaded, request(each, "x")).images for each in (small, image)
    )
    first.pixels, span.pixels = (measured.loaded.patcher.patches(each) for each in (small, image))
    with meter.here(), torch.inference_mode():
        runner.begin_vision([first]).advance(0, runner.depth)  # whatever is made at the first time
        before = meter.allocated
        meter.restart()
        features = runner.begin_vision([span]).advance(0, runner.depth)
    taken = meter.peak - before
    predicted = measured.predicted(1024 * 512).tower
    each, expected = (size / span.patches / 1024 for size in (taken, predicted))
    tell(f"{each:.1f} KiB a patch, predicted {expected:.1f}")
    assert features
    assert taken == pytest.approx(predicted, rel=0.15)


@pytest.fixture
def books(measured, monkeypatch) -> None:
    """torch's books of a pretended GPU."""
    if (gpus := measured.meter) and not isinstance(gpus, Cuda):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _gpu: gpus.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _gpu: gpus.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _gpu: gpus.restart())


CHUNK, SIDES = 128, (512, 256)  # of the largest picture


def test_what_is_measured_is_what_an_engine_takes(measured, books, tell: Tell):
    """The largest requests in every slot keep to the room that the plan gives them."""
    meter, pixels = measured.meter, math.prod(SIDES)
    estimated = measured.predicted(pixels)
    before = meter.allocated
    with meter.here():
        need, shares = measuring.measure(measured.loaded, estimated, CHUNK)
    gc.collect()
    assert meter.allocated <= before + 2**20  # all of it is given back
    assert list(shares.values()) == [1.0]
    for name in ("tower", "token"):
        was, now = getattr(estimated, name) / 1024, getattr(need, name) / 1024
        tell(f"{name}: {now:.1f} KiB, estimated {was:.1f}")
    tell(f"chunk_token: {need.chunk_token / 1024:.1f} KiB")
    settings = load_settings(
        {}, prefill_chunk=CHUNK, max_new_tokens=16, prefix_cache_mb=0, max_concurrency=2
    )

    def planned(free: int) -> plan.MemoryPlan:
        return plan.make(need, settings, plan.Memory([free], cpu=False, shares=[1.0]))

    free = next(free for free in range(plan.GIB // 2, plan.GIB, 2**21) if not planned(free).problem)
    made, margin = planned(free + free // 100), plan.GIB // 2
    options = EngineOptions(2, 16, made.kv_cache, 0, CHUNK, made.patch)
    images = [Image.effect_noise(SIDES, n).convert("RGB") for n in (60, 90)]
    with meter.here():
        engine = Engine(measured.loaded, options)
    try:
        before = settled(engine, meter)
        meter.restart()
        with meter.limit(made.free - margin):
            asked = [engine.submit(request(image, max_new_tokens=4)) for image in images]
            for sequence in asked:
                finish(sequence)
        room, taken = (size / 2**20 for size in (made.free - margin, meter.peak - before))
        tell(f"{taken:.1f} MiB, of {room:.1f} that there were")
        assert all(sequence.tokens for sequence in asked)
    finally:
        engine.close()


def test_the_start_divides_what_is_left_by_what_was_measured(measured, books, monkeypatch):
    """And refuses in a sentence what does not fit, though the estimate had let it pass."""
    monkeypatch.setattr(devices, "gpus", lambda _device: [measured.runner.device])
    settings = load_settings({}, prefill_chunk=CHUNK)
    need = measured.predicted(math.prod(SIDES))
    made = plan.make(need, settings, plan.Memory([plan.GIB * 8], cpu=False))
    assert not made.problem
    said: list[str] = []

    def after(free: int) -> plan.MemoryPlan:
        monkeypatch.setattr(devices, "free_memory", lambda _gpu: free)
        with measured.meter.here():
            return devices.after_loading(measured.loaded, made, said.append)

    left = after(plan.GIB * 2)
    assert said == ["measuring what the largest request takes"]
    assert left.need.tower != need.tower  # measured
    assert 0 < left.kv_cache + left.prefix_cache <= plan.GIB * 1.5
    assert left.kv_cache > 1024 * need.kv_token
    with pytest.raises(ModelLoadError, match="the largest allowed picture does not fit beside"):
        after(plan.GIB // 2 + 15 * plan.MIB)


@pytest.mark.slow
def test_no_memory_for_one_picture(measured, caplog, tell: Tell):
    """It gets 503; what was made for it is given back, and the next answer is what it was."""
    caplog.set_level("CRITICAL")  # a record would hold the traceback, and that the tensors
    meter = measured.meter
    small = request(Image.new("RGB", (256, 256), "red"), max_new_tokens=8, temperature=0)
    large = request(Image.effect_noise((1024, 512), 90).convert("RGB"), max_new_tokens=1)
    with meter.here():
        engine = Engine(measured.loaded, OPTIONS)
    try:
        expected = engine.submit(small)
        finish(expected)
        meter.restart()
        before = settled(engine, meter)
        finish(engine.submit(large))
        taken = meter.peak - before
        tell(f"the large picture took {taken / 2**20:.1f} MiB")
        for share in (0.1, 0.4, 0.7):  # it fails at another place each time
            settled(engine, meter)
            with meter.limit(int(share * taken)), pytest.raises(Unavailable) as refusal:
                list(engine.submit(large))
            assert refusal.value.reason == "memory"
            assert settled(engine, meter) <= before + 2**20
            again = engine.submit(small)
            finish(again)
            assert again.tokens == expected.tokens
        assert engine.failure is None
    finally:
        engine.close()


def settled(engine: Engine, meter: Meter) -> int:
    """What is allocated once the engine has nothing to do, and has given back what it may."""
    until(lambda: not engine.running and engine.step_began is None)
    return meter.allocated
