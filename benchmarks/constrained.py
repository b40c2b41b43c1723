"""What holding answers to a schema costs a step: ``python -m benchmarks.constrained``.

The engine, with the vocabulary of the real checkpoints and rows that decode together: all free,
then all held to a schema, in turns. Its weights are random: a wider model takes longer, and the
difference stays. On a CPU with one thread it is the engine's thread whose CPU time is measured,
since others on the machine make any other clock useless; else it is the time that passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.generation import Constraint, GenerationRequest, SamplingParams, question
from qwenvl_app.loading.load import load, optimise
from tests import real_shape

TEXT = {"type": "string", "minLength": 2000}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object", "minProperties": 500},
    "texts": {"type": "array", "items": {"type": "string"}, "minItems": 500},
    "one long text": {"type": "object", "properties": {"text": TEXT}, "required": ["text"]},
    "records": {
        "type": "array",
        "minItems": 200,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "shape": {"enum": ["circle", "square", "triangle"]},
                "count": {"type": "integer", "minimum": 0, "maximum": 1000},
                "seen": {"type": "string", "format": "date"},
            },
            "required": ["name", "shape", "count", "seen"],
            "additionalProperties": False,
        },
    },
}


@contextmanager
def steps(engine: Engine, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Milliseconds of each step that is taken meanwhile."""
    taken: list[float] = []
    step = engine.step

    def timed() -> None:
        began = clock()
        step()
        taken.append((clock() - began) * 1000)

    engine.step = timed  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        del engine.step  # type: ignore[misc]


def measure(
    engine: Engine,
    rows: int,
    sampling: SamplingParams,
    schema: dict[str, Any] | None,
    clock: Callable[[], float],
) -> list[float]:
    """Milliseconds a step, once all ``rows`` decode."""
    constraint = None if schema is None else Constraint("json", schema)
    image = Image.new("RGB", (256, 256), "red")
    asked = GenerationRequest(question(image, "这张图里有什么？"), "id", sampling)
    asked = dataclasses.replace(asked, constraint=constraint)
    with steps(engine, clock) as taken:
        sequences = [engine.submit(asked) for _ in range(rows)]
        for sequence in sequences:
            for _ in sequence:
                pass
    return taken[10 + 2 * rows : -rows]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16, as in the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    alone = arguments.device == "cpu" and arguments.threads == 1
    clock = time.thread_time if alone else time.perf_counter
    asked = {
        "the likeliest": SamplingParams(temperature=0.0),
        "the checkpoint's": SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
    }
    with tempfile.TemporaryDirectory() as directory:
        shape = real_shape.make(
            Path(directory) / "shape", width=arguments.width, layers=arguments.layers
        )
        loaded = load(str(shape), device=arguments.device, dtype=arguments.dtype)
        loaded = optimise(loaded, cpp=True, cpu_threads=arguments.threads)
        options = EngineOptions(arguments.rows, 4096, 2**30, 0, 1024)
        engine = Engine(loaded, options)
        print(
            f"{arguments.rows} rows on {arguments.device}, 151,936 tokens, width "
            f"{arguments.width}, {arguments.layers} layers, {arguments.threads} threads: ms a step,"
            f" medians of {arguments.rounds} pairs of rounds of {arguments.tokens} tokens"
        )
        for name, sampling in asked.items():
            settings = dataclasses.replace(
                sampling, max_new_tokens=arguments.tokens, ignore_eos=True
            )
            for kind, schema in SCHEMAS.items():
                measure(engine, arguments.rows, settings, schema, clock)  # compiled, and warm
                rounds = [
                    [
                        statistics.median(measure(engine, arguments.rows, settings, each, clock))
                        for each in (None, schema)
                    ]
                    for _ in range(arguments.rounds)
                ]
                free, held = map(statistics.median, zip(*rounds, strict=True))
                more = sorted(100 * (held / free - 1) for free, held in rounds)
                print(
                    f"{name:17}{kind:15}free {free:6.2f}  held {held:6.2f}  "
                    f"{statistics.median(more):+5.1f} % ({more[0]:+.1f} to {more[-1]:+.1f})",
                    flush=True,
                )
        engine.close()


if __name__ == "__main__":
    main()
