"""What the largest request takes on a GPU, measured once the model is loaded.

As vLLM does before it makes its KV cache (``v1/worker/gpu_worker.py``,
``determine_available_memory``): the tower at its most patches and a full chunk of a prompt are run
once, and the peaks are read. Not on a CPU: the largest picture takes it minutes, torch keeps no
books there, and the process's own peak is blurred by what malloc keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from PIL import Image

from qwenvl_app.engine.inputs import Inputs, prepare
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.runner import Runner
from qwenvl_app.generation import GenerationRequest, SamplingParams, question
from qwenvl_app.loading.footprint import Footprint

T = TypeVar("T")


def measure(
    loaded: LoadedModel, need: Footprint, chunk: int
) -> tuple[Footprint, dict[torch.device, float]]:
    """``need`` with what was measured, and each GPU's part of the KV cache, the tower's GPU first.

    ``chunk``: prompt tokens of one step. Blocks. Raises torch.OutOfMemoryError.
    """
    runner = Runner(loaded.model)
    layers = runner.layout.devices
    gpus = sorted({*layers, runner.device}, key=lambda gpu: gpu.index or 0)
    inputs = _largest(loaded, need, chunk)
    [image], length = inputs.images, len(inputs.ids)
    chunk = min(chunk, length)
    with torch.inference_mode():
        tower, made = _peak(gpus, lambda: runner.begin_vision([image]).advance(0, runner.depth))
        [image.features] = made or []
        parts = [image.features.embeds, *image.features.deepstack]
        image.pixels = None
        features = sum(part.nbytes for part in parts)
        cache = runner.new_cache(0)
        cache.fit(1, length)
        last = [length - 1]
        attention, _ = _peak(gpus, lambda: runner.decode(cache, [0], last, last))
        # As much of a sequence as the runner looks at.
        job: Any = SimpleNamespace(inputs=inputs, images=[image], computed=length - chunk)
        prefill, _ = _peak(gpus, lambda: runner.prefill(cache, [job], [0], [chunk]))
    return replace(
        need,
        tower=tower * need.patches // image.patches,
        features=features * need.patches // image.patches,
        # While the cache grows, one layer's keys are there twice.
        token=need.kv_token + attention // length + need.kv_token // (2 * len(layers)),
        chunk_token=max(0, prefill - attention) // chunk,
    ), {gpu: layers.count(gpu) / len(layers) for gpu in gpus}


def _largest(loaded: LoadedModel, need: Footprint, chunk: int) -> Inputs:
    """The largest picture, and a prompt that fills a chunk after it."""
    side = max(1, int(need.pixels**0.5))
    picture = Image.new("RGB", (side, side))
    asked = GenerationRequest(question(picture, "0 " * chunk), "measuring", SamplingParams())
    inputs = prepare(loaded, asked)
    inputs.images[0].pixels = loaded.patcher.patches(picture)
    return inputs


def _peak(gpus: list[torch.device], call: Callable[[], T]) -> tuple[int, T]:
    """The most that ``call`` takes of any GPU beside what is there already, and its result."""
    before = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    result = call()
    most = [torch.cuda.max_memory_allocated(gpu) for gpu in gpus]
    return max(peak - held for peak, held in zip(most, before, strict=True)), result
