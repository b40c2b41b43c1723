"""Engines to test, and ``model.generate`` to compare them with."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from qwenvl_app.engine.engine import Engine, EngineOptions
from qwenvl_app.engine.inputs import prepare
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.pixels import Patcher
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.generation import GenerationRequest, SamplingParams, question
from tests.waiting import until

OPTIONS = EngineOptions(
    slots=4, max_new_tokens=256, kv_cache_bytes=2**28, prefix_cache_bytes=0, prefill_chunk=1024
)
CLOSE = 1e-4  # two logits nearer than this may change places by rounding


@contextmanager
def running(loaded: LoadedModel, **options: int) -> Iterator[Engine]:
    """An engine; afterwards nothing is left in it."""
    engine = Engine(loaded, dataclasses.replace(OPTIONS, **options))
    try:
        yield engine
        until_idle(engine)
    finally:
        engine.close()


def until_idle(engine: Engine) -> None:
    """All slots are free, and so is the memory."""
    cache = engine._executor.cache
    floor = cache._floor * cache.layout.token_bytes
    until(
        lambda: not (engine.running or engine.waiting or engine.cache_bytes > floor),
        said=lambda: (engine.running, engine.waiting, engine.cache_bytes),
    )


def spread(loaded: LoadedModel, attention: str = "sdpa", layers: int = 4) -> LoadedModel:
    """The embedded architecture with random weights, and pictures of up to 256 tokens.

    A trained demo model hides errors, since it answers alike wherever the picture's tokens are.
    Weights this large make every position count, and every answer different.
    """
    torch.manual_seed(1)
    config = copy.deepcopy(loaded.model.config)
    config.text_config.num_hidden_layers = layers
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.12)
    model.generation_config = copy.deepcopy(loaded.model.generation_config)
    processor = copy.deepcopy(loaded.patcher.processor)
    processor.size = {"shortest_edge": 64 * 64, "longest_edge": 512 * 512}
    return dataclasses.replace(loaded, model=model, patcher=Patcher(processor))


def request(image: Image.Image, prompt: str = "这张图里有什么？", **sampling) -> GenerationRequest:
    stream, deadline = sampling.pop("stream", False), sampling.pop("deadline", None)
    return GenerationRequest(
        question(image, prompt), "id", SamplingParams(**sampling), stream, deadline
    )


def random_image(rng: random.Random) -> Image.Image:
    """64 to 1,024 pixels, some of them very wide or very high, no two alike."""
    seeded = np.random.default_rng(rng.getrandbits(32))
    width, height = (round(64 * 16 ** rng.random()) for _ in range(2))
    if rng.random() < 0.15:
        width, height = rng.choice(((1024, 64), (64, 1000), (900, 5), (3, 450)))
    coarse = seeded.integers(0, 256, (rng.randint(1, 9), rng.randint(1, 9), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def random_request(rng: random.Random, **sampling) -> GenerationRequest:
    words = ("描述", "what color ", "图", "is there ", "🎉", "<|im_end|>", "a", "\n")
    prompt = "".join(rng.choice(words) for _ in range(rng.choice((1, 3, 10, 60))))
    settings = {"max_new_tokens": rng.choice((1, 2, 8, 24, 48)), "ignore_eos": True} | sampling
    return request(random_image(rng), prompt, **settings)


def inputs_of(loaded: LoadedModel, asked: GenerationRequest) -> dict[str, torch.Tensor]:
    """What ``generate`` wants, a batch of one."""
    inputs = prepare(loaded, asked)
    types = torch.zeros(1, len(inputs.ids), dtype=torch.long)
    for image in inputs.images:
        types[:, image.tokens.start : image.tokens.stop] = 1
    made = {
        "input_ids": torch.tensor([inputs.ids]),
        "attention_mask": torch.ones_like(types),
        "mm_token_type_ids": types,
    }
    if asked.images:
        patcher = loaded.patcher.within(*asked.pixels)
        # Not as Pillow alone would: see pixels.py.
        pictures = [patcher.resized(image) for image in asked.images]
        # A second time they would be resized where the processor admits one area, as the demo's.
        made |= loaded.patcher.processor(images=pictures, do_resize=False, return_tensors="pt")
    return {name: tensor.to(loaded.model.device) for name, tensor in made.items()}


@dataclasses.dataclass
class Solo:
    """What ``generate`` gives for a request alone, and how near the second choice was."""

    tokens: list[int]
    margins: list[float]


def generate(loaded: LoadedModel, asked: GenerationRequest) -> Solo:
    inputs = inputs_of(loaded, asked)
    # What is None in a configuration passed to generate is taken from the model's own.
    config = loaded.model.generation_config
    ends = config.eos_token_id
    if asked.sampling.ignore_eos:
        config.eos_token_id = None
    with torch.inference_mode():
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=asked.sampling.max_new_tokens or OPTIONS.max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    config.eos_token_id = ends
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    best = torch.stack([step[0].float().topk(2).values for step in output.logits])
    return Solo(tokens, (best[:, 0] - best[:, 1]).tolist())


def agrees(sequence: Sequence, solo: Solo, close: float = CLOSE) -> bool | None:
    """Whether the tokens are those of ``generate``; None if they part where two choices tie."""
    if sequence.tokens == solo.tokens:
        return True
    pairs = enumerate(zip(sequence.tokens, solo.tokens, strict=False))
    first = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
    return None if first is not None and solo.margins[first] < close else False


def judge(pairs: list[tuple[Sequence, Solo]]) -> None:
    verdicts = [agrees(sequence, solo) for sequence, solo in pairs]
    ties = verdicts.count(None)
    assert verdicts.count(False) == 0, f"{verdicts.count(False)} differ, {ties} tie"
    assert ties <= len(verdicts) // 16, f"{ties} ties"


def together(
    engine: Engine, asked: Iterable[tuple[GenerationRequest, Solo]]
) -> list[tuple[Sequence, Solo]]:
    """All at once, answered, each beside what was expected of it."""
    pairs = [(engine.submit(each), solo) for each, solo in asked]
    for sequence, _ in pairs:
        finish(sequence)
    return pairs


def finish(sequence: Sequence) -> str:
    return "".join(delta.text for delta in sequence)
