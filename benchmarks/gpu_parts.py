"""The parts of ``benchmarks.gpu``: each measures one thing on one device and tells it at once."""

from __future__ import annotations

import logging
import random
import time

import torch

from benchmarks import roofline
from benchmarks.gpu_bench import Bench, ask
from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.runner import Mode
from qwenvl_app.errors import Unavailable
from qwenvl_app.generation import GenerationRequest
from qwenvl_app.loading import footprint, measuring, plan
from qwenvl_app.loading.checkpoint import find
from qwenvl_app.settings import load_settings
from tests.engines import agrees, finish, generate, inputs_of, random_request

CLOSE = 3e-4  # two logits of float32 nearer than this may change places: tests/gpu


def equivalence(bench: Bench, modes: tuple[Mode, ...]) -> None:
    """Greedy tokens in float32 against ``generate``, at the full width and with few layers."""
    loaded = bench.model(bench.shallow, "float32")
    rng = random.Random(11)
    asked = [
        random_request(rng, max_new_tokens=bench.tokens // 4, ignore_eos=True) for _ in range(8)
    ]
    solos = [generate(loaded, each) for each in asked]
    loaded = bench.moved(bench.fused(loaded))
    for mode in modes:
        with bench.engine(loaded, 4, mode) as engine:
            verdicts = []
            for _ in range(2):  # graphs are replayed from the second time on
                sequences = [engine.submit(each) for each in asked]
                for sequence in sequences:
                    finish(sequence)
                pairs = zip(sequences, solos, strict=True)
                verdicts += [agrees(sequence, solo, CLOSE) for sequence, solo in pairs]
        counts = [verdicts.count(each) for each in (True, None, False)]
        text = "{} equal, {} tie, {} differ".format(*counts)
        bench.report.put("equivalence in float32", f"compile={mode}", text)
        bench.report.put("CUDA graphs in float32", f"compile={mode}", told(engine))


def told(engine: Engine) -> str:
    """What became of CUDA graphs; why one failed is in the log."""
    stats = engine.stats()
    return f"{stats.cuda_graphs} in use, {stats.cuda_graph_failures} failed"


def steps(bench: Bench, loaded: LoadedModel, mode: Mode) -> None:
    """Milliseconds of a decode step beside what memory allows."""
    name, put = f"steps, compile={mode}", bench.report.put
    read, device = roofline.weight_bytes(loaded.model), loaded.model.device
    with bench.here():
        rate = roofline.bandwidth(device, 2**30 if bench.device == "cuda" else 2**26)
    put(name, "GB/s by a copy", rate / 1e9)
    before, free = bench.meter.allocated if bench.meter else 0, bench.free()
    began = time.monotonic()
    with bench.engine(loaded, max(bench.rows), mode) as engine:
        finish(engine.submit(ask(bench.megapixels[0], 0)))
        put(name, "s to the first answer", time.monotonic() - began)
        for rows in bench.rows:
            if time.monotonic() > bench.deadline:
                put(name, f"{rows} rows", "no time left")
                continue
            step, length = roofline.decode(engine, rows, bench.tokens, 2)
            stats = engine.stats()
            kv = rows * length * stats.kv_budget_bytes // stats.kv_budget_tokens
            least = (read + kv) / rate
            put(name, f"{rows} rows, ms a step", step * 1e3)
            put(name, f"{rows} rows, ms that memory allows", least * 1e3)
            put(name, f"{rows} rows, tokens/s", rows / step)
        put(name, "CUDA graphs", told(engine))
        put(name, "MiB less of the device", (free - bench.free()) / 2**20)
        if bench.meter:
            more = bench.meter.allocated - before - engine.cache_bytes
            put(name, "MiB beside weights and KV cache", more / 2**20)


def first_token(bench: Bench, loaded: LoadedModel) -> None:
    """Seconds from a decoded picture to the first token."""
    with bench.engine(loaded, 1, "off") as engine:
        for size in bench.megapixels:
            spent = bench.seconds(lambda request: finish(engine.submit(request)), size)
            bench.report.put("time to first token, s", f"{size} MP", spent)


def generating(bench: Bench, loaded: LoadedModel) -> None:
    """The same of transformers' ``generate``: the first token, then those that follow."""

    def call(request: GenerationRequest) -> None:
        with torch.inference_mode():
            count = request.sampling.max_new_tokens
            loaded.model.generate(
                **inputs_of(loaded, request), max_new_tokens=count, min_new_tokens=count
            ).tolist()

    name = "transformers' generate"
    first = None
    for size in bench.megapixels:
        spent = bench.seconds(call, size)
        bench.report.put(name, f"{size} MP, s to the first token", spent)
        first = first or spent
    count = bench.tokens // 2
    whole = bench.seconds(call, bench.megapixels[0], count)
    if whole and first:
        bench.report.put(name, "ms a token, 1 row", (whole - first) / (count - 1) * 1e3)


def memory(bench: Bench, loaded: LoadedModel) -> None:
    """What the largest requests in every slot take, against what the plan leaves for them."""
    name, put, meter = "memory", bench.report.put, bench.meter
    if meter is None:
        put(name, "skipped", "torch keeps no books of a CPU's memory")
        return
    settings = load_settings({}, max_concurrency=4, max_new_tokens=16, prefix_cache_mb=0)
    checkpoint = find(str(bench.folder / f"{bench.shape.layers}-{bench.shape.depth}"))
    pixels = settings.max_image_megapixels * 1e6
    estimated = footprint.estimate(checkpoint, "auto", pixels, cpu=False)
    before = meter.allocated
    put(name, "weights, MiB", before / 2**20)
    put(name, "weights estimated, MiB", estimated.weights / 2**20)
    with bench.here():
        need, _ = measuring.measure(loaded, estimated, settings.prefill_chunk)
    for part in ("tower", "token"):
        put(name, f"{part}, KiB", getattr(need, part) / 1024)
        put(name, f"{part} estimated, KiB", getattr(estimated, part) / 1024)
    put(name, "chunk_token, KiB", need.chunk_token / 1024)
    made = plan.make(need, settings, plan.Memory([bench.free()], cpu=False, shares=[1.0]))
    put(name, "the plan", str(made))
    options = EngineOptions(4, 16, made.kv_cache, 0, settings.prefill_chunk, made.patch)
    with bench.here():
        engine = Engine(loaded, options)
    try:
        meter.restart()
        before = meter.allocated
        asked = [engine.submit(ask(need.pixels / 1e6, number, 4)) for number in range(4)]
        for sequence in asked:
            finish(sequence)
        put(name, "4 of the largest at once took, MiB", (meter.peak - before) / 2**20)
        put(name, "the plan allows, MiB", (made.free - plan.GIB // 2) / 2**20)
    finally:
        engine.close()


def running_out(bench: Bench, loaded: LoadedModel) -> None:
    """A picture that there is no memory for gets 503, and the next answer is what it was."""
    name, put, meter = "running out of memory", bench.report.put, bench.meter
    if meter is None:
        put(name, "skipped", "a CPU's memory can't be limited")
        return
    small, large = ask(bench.megapixels[0], 1, 8), ask(bench.megapixels[-2], 2)
    with bench.engine(loaded, 1, "off") as engine:
        expected = engine.submit(small)
        finish(expected)
        meter.restart()
        before = meter.allocated
        finish(engine.submit(large))
        taken = meter.peak - before
        put(name, "the large picture takes, MiB", taken / 2**20)
        for share in (0.1, 0.4, 0.7):  # it fails at another place each time
            refused = "answered"
            logging.disable()  # a record would hold the traceback, and that the tensors
            with meter.limit(int(share * taken)):
                try:
                    finish(engine.submit(large))
                except Unavailable as refusal:
                    refused = str(refusal.reason)
            logging.disable(logging.NOTSET)
            again = engine.submit(small)
            finish(again)
            same = again.tokens == expected.tokens
            put(name, f"with {share:.0%} of it", f"{refused}; then the same answer: {same}")
