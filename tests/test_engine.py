"""The engine gives each request exactly what ``model.generate`` gives for it alone."""

from __future__ import annotations

import dataclasses
import random
import threading
import time

import pytest
import torch
from PIL import Image

from demo.scenes import draw
from qwenvl_app.engine.inputs import prepare
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.runner import Runner
from qwenvl_app.engine.vision import VisionPass
from qwenvl_app.errors import DeadlineExceeded, InternalError, TooLarge, Unavailable
from qwenvl_app.generation import FinishReason, GenerationRequest, Phase
from qwenvl_app.loading.load import load
from tests.engines import (
    Solo,
    finish,
    generate,
    judge,
    random_image,
    random_request,
    request,
    running,
    spread,
    together,
    until_idle,
)
from tests.waiting import until

Asked = tuple[GenerationRequest, Solo]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def wild(demo) -> LoadedModel:
    return spread(demo)


@pytest.fixture(scope="module")
def asked(wild) -> list[Asked]:
    """16 requests, and what ``generate`` answers."""
    return solos(wild, 64, 16)


def solos(wild: LoadedModel, seed: int, count: int) -> list[Asked]:
    rng = random.Random(seed)
    return [(each, generate(wild, each)) for each in [random_request(rng) for _ in range(count)]]


@pytest.fixture(scope="module")
def few(asked) -> list[Asked]:
    """8 of them: pieces of 7 tokens are many steps."""
    return asked[:8]


@pytest.fixture(scope="module")
def more(wild, asked) -> list[Asked]:
    """64."""
    return [*asked, *solos(wild, 40, 48)]


@pytest.mark.parametrize(
    ("whose", "slots", "chunk", "prefix"),
    [
        ("few", 4, 7, 0),
        ("asked", 4, 1024, 2**27),
        *(
            pytest.param("more", *case, marks=(pytest.mark.slow, pytest.mark.timeout(400)))
            for case in (
                *((4, 7, 0), (4, 1024, 2**27), (1, 1024, 0), (4, 1024, 0), (16, 1024, 0)),
                *((4, 64, 0), (16, 31, 2**20)),
            )
        ),
    ],
)
def test_every_token_is_that_of_generate(
    wild, request, whose: str, slots: int, chunk: int, prefix: int
):
    """Mixed sizes, prompts and lengths, joining and leaving at random steps."""
    asked = request.getfixturevalue(whose)
    rng = random.Random(slots * chunk)
    again = asked[:12] if prefix else []
    with running(wild, slots=slots, prefill_chunk=chunk, prefix_cache_bytes=prefix) as engine:
        pairs = []
        for round_ in (asked, again):
            for each, solo in round_:
                pairs.append((engine.submit(each), solo))
                time.sleep(rng.random() * 0.01)
            for sequence, _ in pairs[len(pairs) - len(round_) :]:
                finish(sequence)
        hits = engine.prefixes.hits
    judge(pairs)
    if prefix == 2**27:
        assert hits >= len(again)


def test_eager_attention(demo, asked):
    """It adds its mask to the weights: a mask of True and False would hide nothing from it."""
    eager = spread(demo, "eager")
    assert eager.model.config.text_config._attn_implementation == "eager"
    with running(eager, prefill_chunk=50) as engine:
        pairs = together(engine, asked[:8])
    judge(pairs)


def test_the_demo_model_with_all_its_ends(demo):
    rng = random.Random(3)
    with running(demo) as engine:
        pairs = []
        for _ in range(12):
            image, _scene = draw(rng, 100, 100)
            each = request(image, rng.choice(("描述一下这张图片。", "what shape is present?")))
            pairs.append((engine.submit(each), generate(demo, each)))
        for sequence, _ in pairs:
            assert list(sequence)[-1].finish_reason is FinishReason.STOP
    judge(pairs)


def test_nothing_of_a_request_stays_on_the_model(wild, asked):
    wild.model.model.rope_deltas = poison = torch.tensor([[12345]])
    try:
        with running(wild) as engine:
            pairs = together(engine, asked[:8])
        judge(pairs)
        assert wild.model.model.rope_deltas is poison
    finally:
        wild.model.model.rope_deltas = None


def test_a_large_picture_does_not_stop_the_others(wild):
    """While it is prefilled in small pieces, the others get a token in every step."""
    with running(wild, prefill_chunk=32) as engine:
        small = Image.new("RGB", (64, 64), "red")
        streams = [
            engine.submit(request(small, max_new_tokens=200, ignore_eos=True, stream=True))
            for _ in range(3)
        ]
        for stream in streams:
            next(iter(stream))
        large = engine.submit(request(Image.new("RGB", (1024, 1024), "blue"), max_new_tokens=1))
        until(lambda: large.started)
        before, steps = [len(s.tokens) for s in streams], engine.steps
        finish(large)
        gained = [len(s.tokens) - b for s, b in zip(streams, before, strict=True)]
        taken = engine.steps - steps
        for stream in streams:
            stream.cancel()
        assert taken > 8
        assert min(gained) >= min(taken - 2, 190)


def test_the_same_picture_is_looked_at_once(wild, monkeypatch):
    seen: list[int] = []
    real = VisionPass.__init__

    def counted(self, visual, images):
        seen.append(len(images))
        real(self, visual, images)

    monkeypatch.setattr(VisionPass, "__init__", counted)
    image = random_image(random.Random(8))
    with running(wild, prefix_cache_bytes=2**26) as engine:
        together = [engine.submit(request(image, f"{n}", max_new_tokens=4)) for n in range(4)]
        for sequence in together:
            finish(sequence)
        last = list(engine.submit(request(image, "?", max_new_tokens=1)))[-1]
        assert 0 < last.usage.cached_tokens < last.usage.prompt_tokens
        finish(engine.submit(request(random_image(random.Random(9)), max_new_tokens=1)))
    assert seen == [1, 1]


def test_what_is_made_of_a_picture_goes_when_that_is_read(wild):
    """Of several pictures together it was one tensor, which stayed until all were read."""
    runner = Runner(wild.model)
    images = []
    for size in (64, 96):
        image = Image.new("RGB", (size, size), "red")
        images += prepare(wild, request(image, "?")).images
        images[-1].pixels = wild.patcher.patches(image)
    with torch.inference_mode():
        made = runner.begin_vision(images).advance(0, runner.depth)
    parts = [tensor for each in made for tensor in (each.embeds, *each.deepstack)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in parts}) == len(parts)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in parts)


def test_memory_follows_the_tokens(wild):
    with running(wild) as engine:
        token = engine._executor.cache.layout.token_bytes
        assert engine.cache_bytes == 0
        long = engine.submit(request(Image.new("RGB", (700, 700)), max_new_tokens=200, stream=True))
        next(iter(long))
        assert 256 * token < engine.cache_bytes <= 640 * token
        short = engine.submit(request(Image.new("RGB", (64, 64)), max_new_tokens=2))
        finish(short)
        long.cancel()
        until_idle(engine)


def test_a_request_that_does_not_fit_beside_the_others_waits(wild):
    token = 1024  # what a token takes in this model: 2 x 4 layers x 2 heads x 32 x 4 bytes = 2,048
    with running(wild, kv_cache_bytes=600 * 2 * token) as engine:
        assert engine._executor.cache.layout.token_bytes == 2 * token
        picture = Image.new("RGB", (512, 512))  # 256 tokens
        options = {"max_new_tokens": 40, "ignore_eos": True, "stream": True}
        first = engine.submit(request(picture, **options))
        next(iter(first))
        second = engine.submit(request(picture, **options))
        finish(first)
        finish(second)
        assert second.started >= first.first_token + first.timings.decode
        assert engine.running == 0


def test_a_request_that_could_never_fit_is_refused_before_any_work(wild, monkeypatch):
    monkeypatch.setattr("qwenvl_app.engine.pixels.Patcher.patches", None)
    with (
        running(wild, kv_cache_bytes=200 * 2048) as engine,
        pytest.raises(TooLarge, match=r"图片和提示词共 \d+ 个 token，超过 199 个的限制"),
    ):
        engine.submit(request(Image.new("RGB", (512, 512))))


def test_deadlines_and_cancelling_while_waiting_and_while_running(wild):
    image = Image.new("RGB", (64, 64), "red")
    with running(wild, slots=1) as engine:
        options = {"max_new_tokens": 256, "ignore_eos": True}
        soon = time.monotonic() + 0.15
        runs = engine.submit(request(image, deadline=soon, stream=True, **options))
        waits = engine.submit(request(image, deadline=soon - 0.1, **options))
        left = engine.submit(request(image, **options))
        left.cancel()
        with pytest.raises(DeadlineExceeded):
            list(waits)
        assert list(left)[-1].finish_reason is FinishReason.CANCELLED
        with pytest.raises(DeadlineExceeded):
            list(runs)
        assert 0 < len(runs.tokens) < 256
        last = list(engine.submit(request(image, max_new_tokens=3, ignore_eos=True)))[-1]
        assert last.finish_reason is FinishReason.LENGTH


def test_stop_strings_end_an_answer_and_are_not_part_of_it(demo):
    image, _ = draw(random.Random(1), 100, 100)
    with running(demo) as engine:
        whole = finish(engine.submit(request(image, "描述一下这张图片。")))
        assert "背景" in whole
        for stop in ("背景", "景是浅"):
            deltas = list(engine.submit(request(image, "描述一下这张图片。", stop=("没有", stop))))
            assert "".join(d.text for d in deltas) == whole.partition(stop)[0]
            assert deltas[-1].finish_reason is FinishReason.STOP
        absent = engine.submit(request(image, "描述一下这张图片。", stop=("。。",)))
        assert finish(absent) == whole


def test_endless_repetition_is_ended(wild, monkeypatch):
    """A model that says the same for ever: its logits are bent to do so."""
    image = Image.new("RGB", (64, 64))
    with running(wild) as engine:
        real = engine._runner.decode

        def stuck(*arguments):
            logits = real(*arguments)
            logits[:, 70] += 1000
            return logits

        monkeypatch.setattr(engine._runner, "decode", stuck)
        deltas = list(engine.submit(request(image, repetition_limit=64)))
        assert deltas[-1].finish_reason is FinishReason.REPETITION
        assert 64 <= deltas[-1].usage.completion_tokens <= 96
        free = list(engine.submit(request(image)))
        assert free[-1].finish_reason is FinishReason.LENGTH


def test_timings_and_usage(wild):
    with running(wild) as engine:
        deltas = list(engine.submit(request(Image.new("RGB", (128, 128)), max_new_tokens=5)))
    timings, usage = deltas[-1].timings, deltas[-1].usage
    assert usage.completion_tokens <= 5
    assert usage.prompt_tokens > 16
    assert 0 < timings.preprocess < timings.first_token
    assert timings.first_token >= timings.preprocess + timings.queue
    assert timings.prefill > 0
    assert timings.decode >= 0


def test_one_row_whose_sampling_fails_ends_alone(wild, caplog):
    image = Image.new("RGB", (64, 64))
    with running(wild) as engine:
        others = [
            engine.submit(request(image, max_new_tokens=60, ignore_eos=True, stream=True))
            for _ in range(2)
        ]
        bad = engine.submit(request(image, temperature=1.0, max_new_tokens=60))
        bad.sampler.process = lambda _scores: 1 / 0
        with pytest.raises(InternalError):
            list(bad)
        assert all(list(other)[-1].finish_reason is FinishReason.LENGTH for other in others)
    assert "ZeroDivisionError" in caplog.text


def test_numbers_that_are_not_finite_end_that_row_alone(wild, monkeypatch, asked):
    with running(wild) as engine:
        victim = engine.submit(
            request(Image.new("RGB", (64, 64)), max_new_tokens=40, ignore_eos=True, stream=True)
        )
        next(iter(victim))
        row = engine._scheduler.running.index(victim)
        with torch.inference_mode():
            for values in engine._executor.cache._values:
                values[row].fill_(float("nan"))
        with pytest.raises(InternalError):
            list(victim)
        pairs = together(engine, asked[:8])
    judge(pairs)


def test_a_failing_step_ends_those_in_it_and_the_next_request_works(wild, monkeypatch, caplog):
    image = Image.new("RGB", (64, 64))
    with running(wild, slots=2) as engine:
        real, calls = engine._runner.decode, []

        def once(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("at 0x7f")
            return real(*arguments)

        monkeypatch.setattr(engine._runner, "decode", once)
        options = {"max_new_tokens": 20, "ignore_eos": True}
        sequences = [engine.submit(request(image, **options)) for _ in range(3)]
        outcomes = []
        for sequence in sequences:
            try:
                outcomes.append(list(sequence)[-1].finish_reason)
            except InternalError as error:
                outcomes.append(error.detail)
        assert outcomes.count("推理时发生错误，请稍后重试。") in (1, 2)
        assert outcomes[2] is FinishReason.LENGTH
        assert engine.failure is None
    assert "at 0x7f" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        # Whoever else asks a GPU for memory. The first is of the class of errors that stay.
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        None,
    ],
)
def test_out_of_memory_is_said_as_503(wild, monkeypatch, error):
    with running(wild, prefix_cache_bytes=2**20) as engine:
        real = engine._runner.prefill

        def full(*_arguments):
            if error:
                raise error
            torch.empty(2**60)  # a CPU's is of no class: three of these ended the engine for good

        monkeypatch.setattr(engine._runner, "prefill", full)
        image = Image.new("RGB", (64, 64))
        for _ in range(5):  # however often: a picture that is too large is no broken engine
            with pytest.raises(Unavailable) as refusal:
                list(engine.submit(request(image)))
            assert refusal.value.retry_after
        monkeypatch.setattr(engine._runner, "prefill", real)
        finish(engine.submit(request(image, max_new_tokens=2)))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
)
def test_want_of_memory_to_keep_a_picture_ends_nobody(wild, monkeypatch, asked, error):
    """Its logits were there already, and those of all others; now nothing is kept instead."""
    with running(wild, prefix_cache_bytes=2**26) as engine:
        cache = engine._executor.cache
        real, calls = cache.save, []

        def full(*arguments):
            calls.append(1)
            if len(calls) > 1:
                raise error
            return real(*arguments)

        monkeypatch.setattr(cache, "save", full)
        pairs = together(engine, asked[:8])
        assert len(calls) == 16  # the picture, and the answer to it
        assert len(engine.prefixes) == 0
        monkeypatch.setattr(cache, "save", real)
        again = [(engine.submit(each), solo) for each, solo in asked[:4]]
        for sequence, _ in again:
            finish(sequence)
        assert len(engine.prefixes) == 8
    judge(pairs + again)


def test_what_waiting_requests_hold_of_known_pictures_counts(wild):
    """It had been dropped for others, and was there beside all that the budget allows."""
    rng = random.Random(12)
    images = [random_image(rng) for _ in range(6)]
    options = {"max_new_tokens": 200, "ignore_eos": True, "stream": True}
    with running(wild, slots=1, prefix_cache_bytes=2**20) as engine:
        finish(engine.submit(request(images[0], max_new_tokens=1)))
        kept = engine.prefixes.bytes
        busy = engine.submit(request(Image.new("RGB", (64, 64)), **options))
        next(iter(busy))
        waits = engine.submit(request(images[0], max_new_tokens=1))
        held = waits.prefix
        assert held
        assert not engine.prefixes.make_room(engine.prefixes.budget - kept + 1)
        assert engine.prefixes.bytes >= kept
        busy.cancel()
        finish(waits)
        del held
        for image in images[1:]:
            finish(engine.submit(request(image, max_new_tokens=1)))
            assert engine.prefixes.bytes <= engine.prefixes.budget


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_failure_that_keeps_coming_marks_the_engine(wild, monkeypatch, part):
    """A prefill that works does not make up for a decode that never does."""
    with running(wild) as engine:

        def broken(*_arguments):
            raise RuntimeError("again")

        monkeypatch.setattr(engine._runner, part, broken)
        image = Image.new("RGB", (64, 64))
        for _ in range(3):
            with pytest.raises(InternalError):
                list(engine.submit(request(image)))
        engine._thread.join(5)
        assert not engine._thread.is_alive()
        assert engine.failure.phase is Phase.FAILED
        assert "RuntimeError" in engine.failure.message
        with pytest.raises(InternalError):
            engine.submit(request(image))


def test_an_idle_engine_does_nothing(wild):
    with running(wild) as engine:
        finish(engine.submit(request(Image.new("RGB", (64, 64)), max_new_tokens=2)))
        until_idle(engine)
        time.sleep(0.05)
        steps, cpu = engine.steps, time.process_time()
        time.sleep(0.5)
        assert engine.steps == steps
        assert time.process_time() - cpu < 0.1


def test_closing_ends_what_runs_and_what_waits(wild):
    """Rows are not moved any more then: one that failed to left its reader waiting for ever."""
    image = Image.new("RGB", (64, 64))
    options = {"max_new_tokens": 256, "ignore_eos": True, "stream": True}
    with running(wild, slots=3) as engine:
        runs = [engine.submit(request(image, **options)) for _ in range(3)]
        next(iter(runs[-1]))
        waits = engine.submit(request(image))
        closer = threading.Thread(target=engine.close)
        closer.start()
        for sequence in (*runs, waits):
            with pytest.raises(Unavailable):
                list(sequence)
        closer.join()
        with pytest.raises(Unavailable):
            engine.submit(request(image))


@pytest.mark.parametrize(("continues", "kept"), [(True, 2), (False, 1)])
def test_an_answer_is_kept_if_a_turn_may_follow(wild, continues: bool, kept: int):
    """Of a form, which has one question, the picture alone: more cost a tenth of the rate."""
    asked = dataclasses.replace(random_request(random.Random(1)), continues=continues)
    with running(wild, prefix_cache_bytes=2**27) as engine:
        finish(engine.submit(asked))
        assert len(engine.prefixes) == kept
