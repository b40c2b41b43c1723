"""What a token costs once its logits are there: ``python -m benchmarks.sampling``.

For rows of one step as the engine picks them: the likeliest, and drawn as Qwen3-VL's checkpoints
ask (temperature 0.7, top_p 0.8, top_k 20), also with a penalty, without top-k and without any rule.
Logits are random, and as uneven as a model's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import GenerationConfig

from qwenvl_app.engine.sampling import Sampler, next_tokens
from qwenvl_app.generation import SamplingParams

SETTINGS = {
    "the likeliest": SamplingParams(),
    "the checkpoint's": SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
    "with a penalty": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    "without top-k": SamplingParams(temperature=0.7, top_p=0.8, top_k=0),
    "no rule": SamplingParams(temperature=1.0, top_k=0),
}


def measure(params: SamplingParams, logits: torch.Tensor, steps: int) -> list[float]:
    """Milliseconds a row, of each step."""
    prompt = list(range(1000))
    samplers = [Sampler(params, GenerationConfig(), prompt, logits.device) for _ in logits]
    taken = []
    with torch.inference_mode():
        for _ in range(steps + 3):
            began = time.perf_counter()
            next_tokens(samplers, logits)
            taken.append((time.perf_counter() - began) * 1000 / len(logits))
    return taken[3:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"ms a row on {arguments.device}, {arguments.vocabulary:,} tokens, "
        f"{arguments.threads} threads, medians (best) of {arguments.steps} steps"
    )
    for rows in arguments.rows:
        logits = 3 * torch.randn(rows, arguments.vocabulary, device=arguments.device)
        for name, params in SETTINGS.items():
            taken = measure(params, logits, arguments.steps)
            print(f"{rows} x {name:17}{statistics.median(taken):7.3f} ({min(taken):.3f})")


if __name__ == "__main__":
    main()
