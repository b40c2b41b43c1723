"""How near decoding is to what memory allows: ``python -m benchmarks.roofline [--model ...]``.

A step of few sequences has to read every weight of the language model once, and the keys and values
of all that was said before; it can't be faster than memory delivers them. That rate is measured
here too, by a copy. On a GPU and on a CPU; for dense models, since a mixture reads a few experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.checkpoints import write_checkpoint
from qwenvl_app import process
from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.generation import GenerationRequest, SamplingParams, question
from qwenvl_app.loading.load import load, optimise


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that are read and written, the best of ten copies of ``size`` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def once() -> float:
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return 2 * size / min(once() for _ in range(10))


def weight_bytes(model: Any) -> int:
    """What a step reads: the language model and its head, but a row each of the embedding."""
    embedding, head = model.model.language_model.embed_tokens.weight, model.lm_head.weight
    read = {id(p): p for p in [*model.model.language_model.parameters(), head]}
    if head is not embedding:
        del read[id(embedding)]
    return sum(p.numel() * p.element_size() for p in read.values())


def decode(engine: Engine, clients: int, tokens: int, rounds: int) -> tuple[float, int]:
    """Seconds a step with so many sequences, and the tokens that each has halfway."""
    sampling = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
    seconds, prompt = [], 0
    for number in range(rounds + 1):
        picture = Image.effect_noise((448, 448), 10 + number).convert("RGB")
        request = GenerationRequest(question(picture, "描述一下这张图片。"), "", sampling)
        sequences = [engine.submit(request) for _ in range(clients)]
        last = [list(sequence)[-1] for sequence in sequences]
        # From the last one's first token on, all of them are in every step.
        spent = min(delta.timings.decode for delta in last)
        prompt = last[0].usage.prompt_tokens
        if number:  # the first round warms up
            seconds.append(spent / (tokens - 1))
    return statistics.median(seconds), prompt + tokens // 2


def main() -> None:
    """Measure and print, as a table and as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="as MODEL; by default one of 15 million parameters")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", choices=("auto", "off"), default="auto", help="on a CPU")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    chosen = parser.parse_args()
    process.use_threads(0)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.model is None:
            write_checkpoint(Path(folder))
        loaded = load(chosen.model or folder, device=chosen.device, dtype=chosen.dtype)
    read, device = weight_bytes(loaded.model), loaded.model.device
    rate = bandwidth(device, 2**30 if device.type == "cuda" else 2**28)
    loaded = optimise(loaded, cpp=chosen.compile == "auto")
    slots = max(chosen.clients)
    engine = Engine(loaded, EngineOptions(slots, chosen.tokens, 2**32, 0, 1024))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report: dict[str, Any] = {"device": name, "GB/s": rate / 1e9, "weights, MB": read / 1e6}
    print(f"{name}: {rate / 1e9:.1f} GB/s by a copy; a step reads {read / 1e6:,.1f} MB of weights")
    try:
        for clients in chosen.clients:
            step, length = decode(engine, clients, chosen.tokens, chosen.rounds)
            kv = (
                clients * length * engine.stats().kv_budget_bytes // engine.stats().kv_budget_tokens
            )
            least = (read + kv) / rate
            report[f"{clients} client(s)"] = {
                "ms a step": step * 1e3,
                "ms at least": least * 1e3,
                "tokens/s": clients / step,
                "share of the roofline": least / step,
            }
            print(
                f"{clients} client(s): {step * 1e3:.2f} ms a step, {clients / step:.0f} tokens/s; "
                f"memory allows {least * 1e3:.2f} ms: {least / step:.0%} of the roofline"
            )
    finally:
        engine.close()
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
