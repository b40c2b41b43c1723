"""Does memory stay where it was? ``python -m benchmarks.soak``: 10,000 short requests, in process.

Every picture is another one, so that everything that is kept about pictures is put to the test.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.generation import GenerationRequest, SamplingParams, question
from qwenvl_app.loading.load import load, optimise


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Ask, and print memory now and then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    rng = random.Random(0)
    options = EngineOptions(
        slots=4,
        max_new_tokens=4,
        kv_cache_bytes=2**28,
        prefix_cache_bytes=2**24,
        prefill_chunk=1024,
    )
    engine = Engine(optimise(load("demo"), cpp=True), options)

    def ask(count: int) -> None:
        running = []
        for _ in range(count):
            size = rng.randint(32, 96), rng.randint(32, 96)
            grain = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), dtype=np.uint8)
            image = Image.fromarray(grain.reshape(size[1], size[0], 3))
            sampling = SamplingParams(max_new_tokens=rng.randint(1, 4))
            running.append(
                engine.submit(
                    GenerationRequest(question(image, "x" * rng.randint(1, 40)), "", sampling)
                )
            )
        for sequence in running:
            list(sequence)

    ask(500)  # the prefix cache fills, allocators find their size
    before = resident()
    for _ in tqdm(range(arguments.requests // 20)):
        ask(20)
    after = resident()
    steps, cpu = engine.steps, time.process_time()
    time.sleep(5)
    idle = time.process_time() - cpu
    print(f"memory: {before:.0f} MiB before, {after:.0f} MiB after {arguments.requests} requests")
    print(f"idle for 5 s: {engine.steps - steps} steps, {idle:.3f} s of CPU")
    engine.close()


if __name__ == "__main__":
    main()
