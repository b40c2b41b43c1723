"""Decoded together, each request gets what ``model.generate`` gives for it alone."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import get_args

import pytest
import torch

from qwenvl_app.engine import intake
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.generation import GenerationRequest
from qwenvl_app.settings import Settings
from tests.engines import agrees, finish, generate, inputs_of, random_request, running
from tests.gpu.conftest import Tell

ATTENTION = [
    name for name in get_args(Settings.model_fields["attention"].annotation) if name != "auto"
]
pytestmark = pytest.mark.slow  # make test-gpu has all; of a CPU others here prove the same
STEPS = 16
# Two logits nearer than this may change places by rounding, in float32. At a width of 2,048 and on
# a CPU those of ``generate`` and of the engine differed by 1.5e-5, where their size is 1.4.
CLOSE = 3e-4


def requests(seed: int, count: int, **sampling) -> list[GenerationRequest]:
    rng = random.Random(seed)
    return [random_request(rng, ignore_eos=True, **sampling) for _ in range(count)]


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_token_in_float32(exact, attention, tell: Tell):
    """With each attention that may be set, against ``generate`` with torch's own."""
    asked = requests(11, 8 if exact.model.device.type == "cuda" else 4)  # test_engine.py has more
    solos = [generate(exact, each) for each in asked]
    before = exact.model.config.text_config._attn_implementation
    exact.model.set_attn_implementation(attention)
    try:
        with running(exact, prefill_chunk=50) as engine:
            sequences = [engine.submit(each) for each in asked]
            for sequence in sequences:
                finish(sequence)
    finally:
        exact.model.set_attn_implementation(before)
    verdicts = [agrees(s, solo, CLOSE) for s, solo in zip(sequences, solos, strict=True)]
    tell(f"{verdicts.count(True)} of {len(verdicts)} answers equal, {verdicts.count(None)} tie")
    assert False not in verdicts
    assert verdicts.count(None) <= 1
    assert (
        len({tuple(sequence.tokens) for sequence in sequences}) > len(asked) // 2
    )  # they are not all alike


class Forced:
    """In a Sampler's place: says what it is told, and keeps the logits it would have drawn from."""

    rng = matcher = None
    processes = True

    def __init__(self, tokens: list[int]):
        self._tokens = iter(tokens)
        self.logits: list[torch.Tensor] = []

    def process(self, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(scores[0])
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self._tokens)] = 0
        return forced

    def append(self, token: int) -> None:
        pass


def truth(exact: LoadedModel, asked: GenerationRequest, tokens: list[int]) -> torch.Tensor:
    """The logits (tokens, vocabulary) of an answer, all at once in float32."""
    inputs = inputs_of(exact, asked)
    length = inputs["input_ids"].shape[1]
    answer = inputs["input_ids"].new_tensor([tokens])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        more = torch.full_like(answer, value)
        inputs[name] = torch.cat([inputs[name], more], dim=1)
    with torch.inference_mode():
        logits: torch.Tensor = exact.model(**inputs).logits[0, length - 1 : -1]
    return logits.float()


def alone(half: LoadedModel, asked: GenerationRequest) -> tuple[list[int], torch.Tensor]:
    """The tokens of ``generate`` and their logits, in bfloat16."""
    inputs, length = inputs_of(half, asked), asked.sampling.max_new_tokens
    with torch.inference_mode():
        output = half.model.generate(
            **inputs,
            max_new_tokens=length,
            min_new_tokens=length,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, torch.cat(output.logits).float()


def test_bfloat16_is_as_near_to_float32_as_generate_is(half, exact, monkeypatch, tell: Tell):
    """Rounding to 8 bits depends on how many rows a product has, so tokens can't be compared.

    Instead the answer of ``generate`` is prescribed, and at each of its tokens the logits of both
    are held against those of the same weights in float32. An engine that reads a wrong row,
    position or picture is off by as much as the logits are large; one that is right by no more than
    ``generate``, which sets the tolerance by itself, whatever device and kernels there are.
    """
    asked = requests(7, 8, max_new_tokens=STEPS)
    asked = [
        dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, seed=number))
        for number, each in enumerate(asked)
    ]
    solos = [alone(half, each) for each in asked]
    truths = [truth(exact, each, tokens) for each, (tokens, _) in zip(asked, solos, strict=True)]
    samplers = [Forced(tokens) for tokens, _ in solos]
    monkeypatch.setattr(intake, "Sampler", lambda params, *_: samplers[params.seed])
    with running(half, prefill_chunk=50) as engine:
        sequences = []
        for each in asked:  # they join at different steps
            sequences.append(engine.submit(each))
            time.sleep(0.02)
        for sequence in sequences:
            finish(sequence)
    assert [sequence.tokens for sequence in sequences] == [tokens for tokens, _ in solos]

    ours, theirs, flips = [], [], 0
    for (_, solo), forced, right in zip(solos, samplers, truths, strict=True):
        logits = torch.stack(forced.logits)
        size = right.std(dim=-1)
        ours.append((logits - right).std(dim=-1) / size)
        theirs.append((solo - right).std(dim=-1) / size)
        best = right.topk(2).values
        clear = best[:, 0] - best[:, 1] > 4 * (solo - right).abs().amax()
        flips += int((logits.argmax(-1) != right.argmax(-1))[clear].sum())
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    tell(
        f"off by {ours.mean():.2%} of the logits' size (at most {ours.max():.2%}); "
        f"generate by {theirs.mean():.2%} (at most {theirs.max():.2%})"
    )
    assert theirs.mean() < 0.2, "these weights are too wild to tell anything"
    assert ours.mean() < 1.5 * theirs.mean()
    assert ours.max() < 3 * theirs.max()
    assert flips == 0


def test_one_seed_gives_one_answer_on_its_device(half):
    """Each sequence draws from a generator of its own, which is on the device of the logits."""
    asked = requests(5, 1, max_new_tokens=12, temperature=1.0, repetition_penalty=1.1)[0]

    def seeded(seed: int) -> GenerationRequest:
        return dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, seed=seed))

    with running(half, slots=1) as engine:
        answers = []
        for seed in (1, 1, 2):
            sequence = engine.submit(seeded(seed))
            finish(sequence)
            answers.append(sequence.tokens)
    assert answers[0] == answers[1] != answers[2]
