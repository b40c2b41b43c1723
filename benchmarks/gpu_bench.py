"""What ``benchmarks.gpu`` measures with: the device, the models, the file for the figures."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image

from benchmarks.shapes import Shape, randomise
from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.engine.fused import fuse
from qwenvl_app.engine.memory import free_memory
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.runner import Mode
from qwenvl_app.generation import GenerationRequest, SamplingParams, question
from qwenvl_app.loading.load import load
from tests.gpu.meter import Cuda, Meter
from tests.gpu.pretend import Gpus, pretend


class Report:
    """What was found, in a file that is written anew with every figure, and on the screen."""

    def __init__(self, path: Path):
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def put(self, part: str, name: str, value: Any) -> None:
        """One figure, or one sentence."""
        self.found.setdefault(part, {})[name] = value
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self.found, indent=1, ensure_ascii=False), encoding="utf-8")
        fresh.replace(self._path)
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        print(f"[{part}] {name}: {shown}", flush=True)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A device and the sizes that suit it. ``meter``: None where torch keeps no books, on a CPU."""

    device: str  # "cuda", "cpu", or "pretended": tests/gpu/pretend.py
    shape: Shape
    shallow: Shape  # for what is compared in float32
    folder: Path
    report: Report
    meter: Meter | None
    deadline: float  # time.monotonic()
    rows: tuple[int, ...]
    tokens: int
    megapixels: tuple[float, ...]

    def model(self, shape: Shape, dtype: str = "auto") -> LoadedModel:
        """At random, on the device; if that is pretended, on the CPU: see ``moved``."""
        directory = self.folder / f"{shape.layers}-{shape.depth}"
        if not directory.exists():
            shape.write(directory)
        loaded = load(
            str(directory), device="cuda" if self.device == "cuda" else "cpu", dtype=dtype
        )
        randomise(loaded.model)
        return loaded

    def moved(self, loaded: LoadedModel) -> LoadedModel:
        """``loaded`` where it is measured: itself, or a copy on a pretended GPU."""
        if not isinstance(self.meter, Gpus):
            return loaded
        model = copy.deepcopy(loaded.model)
        with self.meter.here():
            self.meter.move(model)
        return dataclasses.replace(loaded, model=model)

    def fused(self, loaded: LoadedModel) -> LoadedModel:
        """``loaded`` as the service has it; what is to be moved yet stays as it is."""
        if not isinstance(self.meter, Gpus):
            fuse(loaded.model)
        return loaded

    @contextmanager
    def engine(self, loaded: LoadedModel, slots: int, mode: Mode, kv: int = 0) -> Iterator[Engine]:
        """One with ``compile = mode`` and so many bytes of KV cache."""
        kv = kv or min(2**33, self.free() // 2)
        options = EngineOptions(slots, 4096, kv, 0, 1024, compile=mode)
        with self.here():
            engine = Engine(loaded, options)
        try:
            yield engine
        finally:
            engine.close()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within the block, this thread may use the device."""
        with ExitStack() as stack:
            if self.meter:
                stack.enter_context(self.meter.here())
            yield

    def free(self) -> int:
        """Bytes of the device."""
        if isinstance(self.meter, Gpus):
            return 2**33
        return free_memory(torch.device(self.device))

    def seconds(
        self, call: Callable[[GenerationRequest], object], megapixels: float, tokens: int = 1
    ) -> float | None:
        """The median of three calls, after one that warms up; None when the time is up before."""
        spent: list[float] = []
        for request in [ask(megapixels, number, tokens) for number in range(4)]:
            if time.monotonic() > self.deadline:
                break
            began = time.perf_counter()
            call(request)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent[1:]) if spent[1:] else None


@contextmanager
def pretended() -> Iterator[Gpus]:
    """A GPU that is not there, with torch's books of it."""
    with pretend() as gpus, ExitStack() as stack:
        for name, value in (
            ("memory_allocated", lambda _gpu=None: gpus.allocated),
            ("memory_reserved", lambda _gpu=None: gpus.allocated),
            ("max_memory_allocated", lambda _gpu=None: gpus.peak),
            ("reset_peak_memory_stats", lambda _gpu=None: gpus.restart()),
            ("synchronize", lambda _gpu=None: None),
            ("get_device_properties", lambda _gpu=None: SimpleNamespace(total_memory=gpus.total)),
        ):
            stack.enter_context(patch(f"torch.cuda.{name}", value))
        yield gpus


def meter(device: str) -> Meter | None:
    """Of a real device."""
    return Cuda(torch.device(device)) if device == "cuda" else None


def ask(megapixels: float, number: int, tokens: int = 1) -> GenerationRequest:
    """About a picture that no other ``number`` has, 4 to 3."""
    side = (megapixels * 1e6 / 12) ** 0.5
    picture = Image.effect_noise((int(4 * side), int(3 * side)), 10 + number).convert("RGB")
    sampling = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
    return GenerationRequest(question(picture, "描述一下这张图片。"), "bench", sampling)
