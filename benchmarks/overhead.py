"""What HTTP, admission and the engine add to ``model.generate``: ``python -m benchmarks.overhead``.

Starts the service with the embedded model on a free port, loads the same checkpoint in this
process, and asks both the same easy-VQA questions, in blocks that take turns, so that a busy
moment of the machine hits both. ``generate`` alone gets its inputs ready made; the service is also
compared with the replaced script's way, which prepares them from the file each time.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from demo.evaluate import Case, ask, package_cases
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.generation import GenerationRequest, question
from qwenvl_app.loading.load import load
from tests.e2e.server import Server
from tests.engines import inputs_of


def prepare(loaded: LoadedModel, case: Case) -> dict[str, torch.Tensor]:
    """The inputs of ``generate`` from a file and a prompt."""
    image = Image.open(io.BytesIO(case.image)).convert("RGB")
    return inputs_of(loaded, GenerationRequest(question(image, case.prompt), ""))


def generate(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> str:
    """One answer, the replaced script's way."""
    with torch.inference_mode():
        output = loaded.model.generate(**inputs, max_new_tokens=1024)
    ids = output[:, inputs["input_ids"].shape[1] :]
    return str(loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)[0])


def timed(answer: Callable[[Any], str], questions: list[Any]) -> tuple[float, list[str]]:
    """Seconds that all answers take, and the answers."""
    began = time.perf_counter()
    answers = [answer(question) for question in questions]
    return time.perf_counter() - began, answers


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--questions", type=int, default=20, help="a block")
    arguments = parser.parse_args()
    loaded = load("demo")
    cases = list(package_cases())[:: 9673 // (arguments.blocks * arguments.questions)]
    seconds: dict[str, list[float]] = {"http": [], "generate": [], "script": []}
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory) / "log")
        try:
            server.wait()
            for block in tqdm(range(-1, arguments.blocks)):  # the first one warms up
                first = max(0, block) * arguments.questions
                asked = cases[first : first + arguments.questions]
                ready_made = [prepare(loaded, case) for case in asked]
                results = {
                    "http": timed(partial(ask, server.url), asked),
                    "generate": timed(partial(generate, loaded), ready_made),
                    "script": timed(lambda case: generate(loaded, prepare(loaded, case)), asked),
                }
                if len({tuple(answers) for _, answers in results.values()}) != 1:
                    raise RuntimeError("the answers differ")
                if block >= 0:
                    for name, (spent, _) in results.items():
                        seconds[name].append(spent)
        finally:
            server.stop()
    each = {name: sum(times) / len(times) / arguments.questions for name, times in seconds.items()}
    for name, spent in each.items():
        print(f"{name:10} {spent * 1000:7.1f} ms a question")
    for other in ("generate", "script"):
        pairs = zip(seconds["http"], seconds[other], strict=True)
        ratio = statistics.median(http / alone for http, alone in pairs)
        print(f"http / {other:9} {ratio:5.2f}  (median of {arguments.blocks} paired blocks)")


if __name__ == "__main__":
    main()
