"""How many GPUs: arithmetic, ``python -m benchmarks.sizing``; docs/capacity.md explains it.

Nothing here was measured on a GPU. Seconds, bytes and operations throughout, unless a name says
otherwise; a multiplication and an addition are two operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_SHARE = 0.7  # of a GPU's bandwidth that a decode step gets
FLOPS_SHARE = 0.5  # of its dense bfloat16 operations that prefill and vision tower get
MEMORY_USED = 0.9  # --gpu-memory-utilization
ACTIVATIONS = 4e9  # what the largest picture's way through the vision tower takes, roughly
BUSY = 0.7  # of its capacity that a GPU is planned for: docs/capacity.md shows what is beyond


@dataclass(frozen=True)
class Gpu:
    """From the maker's data sheets; ``price`` a GPU hour is an assumption."""

    name: str
    bandwidth: float
    flops: float
    memory: float
    price: float


H100 = Gpu("H100 SXM", 3.35e12, 989e12, 80e9, 3.0)
A100 = Gpu("A100 SXM 80 GB", 2.04e12, 312e12, 80e9, 1.6)
L40S = Gpu("L40S", 0.864e12, 362e12, 48e9, 1.0)
GPUS = (H100, A100, L40S)


@dataclass(frozen=True)
class Model:
    """A dense model in bfloat16; by default Qwen3-VL-8B, from its ``config.json``."""

    layers: int = 36
    width: int = 4096
    kv_heads: int = 8
    head: int = 128
    blocks: float = 6.95e9  # parameters that a token goes through, without embedding and output
    output: float = 0.62e9  # parameters of the output, read for each new token
    weights: float = 17.5e9
    vision_layers: int = 27
    vision_width: int = 1152
    vision: float = 0.45e9  # parameters that a patch goes through
    patches: int = 4  # for one token

    @property
    def kv_bytes(self) -> int:
        """Of one token: keys and values of every layer."""
        return 2 * self.layers * self.kv_heads * self.head * 2


@dataclass(frozen=True)
class Work:
    """One request. A picture of a megapixel is about 1,000 tokens."""

    picture_tokens: int = 1000
    prompt_tokens: int = 100
    answer_tokens: int = 150

    @property
    def context(self) -> float:
        """Tokens in the cache, on average over the answer."""
        return self.picture_tokens + self.prompt_tokens + self.answer_tokens / 2


@dataclass(frozen=True)
class Engine:
    """One GPU with one copy of the model, and how long its work takes."""

    gpu: Gpu = H100
    model: Model = Model()
    work: Work = Work()
    most_slots: int = 64  # --max-num-seqs

    def vision_s(self) -> float:
        """The picture through the vision tower, all patches attending to all."""
        patches = self.model.patches * self.work.picture_tokens
        attention = 4 * self.model.vision_layers * self.model.vision_width * patches**2
        return self._compute(2 * self.model.vision * patches + attention)

    def prefill_s(self, *, known: bool = False) -> float:
        """Picture and prompt; ``known``: the picture's keys and values are cached."""
        begins = self.work.picture_tokens if known else 0
        ends = self.work.picture_tokens + self.work.prompt_tokens
        attention = 2 * self.model.layers * self.model.width * (ends**2 - begins**2)
        text = self._compute(2 * self.model.blocks * (ends - begins) + attention)
        return text if known else text + self.vision_s()

    def step_s(self, rows: float) -> float:
        """One token for each of ``rows``: weights and caches are read, or it is computed."""
        weights = 2 * (self.model.blocks + self.model.output)
        read = weights + rows * self.work.context * self.model.kv_bytes
        return max(read / (MEMORY_SHARE * self.gpu.bandwidth), self._compute(weights * rows))

    @property
    def cache_tokens(self) -> int:
        """Tokens for which there is room beside the weights."""
        room = MEMORY_USED * self.gpu.memory - self.model.weights - ACTIVATIONS
        return int(room / self.model.kv_bytes)

    @property
    def slots(self) -> int:
        """Requests that are decoded together: as allowed, or as fit."""
        tokens = self.work.context + self.work.answer_tokens / 2
        return min(self.most_slots, int(self.cache_tokens / tokens))

    def requests_per_s(self, known: float = 0.0) -> float:
        """At most, with all slots taken; ``known``: the share of pictures that are cached."""
        prefill = known * self.prefill_s(known=True) + (1 - known) * self.prefill_s()
        decode = self.work.answer_tokens * self.step_s(self.slots) / self.slots
        return 1 / (prefill + decode)

    def gpus(self, requests_per_s: float) -> int:
        """Needed for that many requests, ``BUSY``."""
        return math.ceil(requests_per_s / (BUSY * self.requests_per_s()) - 1e-9)

    def _compute(self, operations: float) -> float:
        return operations / (FLOPS_SHARE * self.gpu.flops)


def rates() -> list[str]:
    """What one GPU does."""
    lines = [
        "| GPU | pictures/s | step, 1 row | step, all slots | slots | tokens/s | requests/s | "
        "picture known |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpu in GPUS:
        each = Engine(gpu)
        slots = each.slots
        lines.append(
            f"| {gpu.name} | {1 / each.prefill_s():.1f} | {1e3 * each.step_s(1):.1f} ms | "
            f"{1e3 * each.step_s(slots):.1f} ms | {slots} | {slots / each.step_s(slots):,.0f} | "
            f"{each.requests_per_s():.1f} | {each.requests_per_s(1):.1f} |"
        )
    return lines


def table() -> list[str]:
    """GPUs needed for N requests per second at M tokens."""
    lines = [
        "| Tokens of an answer | Requests/s | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "| --- " * (2 + len(GPUS)) + "|",
    ]
    for tokens in (16, 150, 1000):
        for load in (1, 10, 100, 1000):
            needed = [Engine(gpu, work=Work(answer_tokens=tokens)).gpus(load) for gpu in GPUS]
            lines.append(
                f"| {tokens:,} | {load:,} | " + " | ".join(f"{n:,}" for n in needed) + " |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join([*rates(), "", *table()]))
