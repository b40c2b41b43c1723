"""What is drawn is what ``generate`` draws; what is seeded comes again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.sampling import Sampler, repeats_itself
from qwenvl_app.generation import SamplingParams
from qwenvl_app.loading.load import load
from tests.engines import finish, request, running, spread

CPU = torch.device("cpu")
DRAWS = 4000


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    return spread(load("demo"))


def chi_square(ours: Counter[int], theirs: Counter[int]) -> tuple[float, int]:
    """Two samples of one size; tokens seen fewer than ten times in all are put together."""
    rare_ours = rare_theirs = 0
    value, degrees = 0.0, -1
    for token in ours | theirs:
        a, b = ours[token], theirs[token]
        if a + b < 10:
            rare_ours, rare_theirs = rare_ours + a, rare_theirs + b
        else:
            value, degrees = value + (a - b) ** 2 / (a + b), degrees + 1
    if rare_ours + rare_theirs:
        value += (rare_ours - rare_theirs) ** 2 / (rare_ours + rare_theirs)
        degrees += 1
    return value, degrees


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 8},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},  # Qwen3-VL's own
        {"temperature": 1.5, "top_k": 12, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 10, "repetition_penalty": 1.3},
        {"top_p": 0.5, "temperature": 2.0, "top_k": 0},
    ],
)
def test_the_distribution_is_that_of_generate(wild, settings):
    ids = torch.tensor([[70, 71, 300, 301, 70]])
    torch.manual_seed(0)
    with torch.inference_mode():
        logits = wild.model(input_ids=ids).logits[0, -1]
        drawn = wild.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=True,
            num_return_sequences=DRAWS,
            **settings,
        )[:, -1]
    theirs = Counter(drawn.tolist())
    ours = Counter(
        Sampler(
            SamplingParams(seed=seed, **settings),
            GenerationConfig(),
            ids[0].tolist(),
            CPU,
        ).sample(logits)
        for seed in range(DRAWS)
    )
    value, degrees = chi_square(ours, theirs)
    assert degrees >= 2
    # Mean `degrees`, variance 2 x `degrees`: five standard deviations.
    assert value < degrees + 5 * (2 * degrees) ** 0.5, (value, degrees)


def test_the_checkpoint_decides_what_the_request_leaves_open():
    logits = torch.tensor([0.0, 3.0, 2.9, -5.0])

    def tokens(params: SamplingParams, **config) -> set[int]:
        return {
            Sampler(params, GenerationConfig(**config), [0], CPU).sample(logits) for _ in range(200)
        }

    assert tokens(SamplingParams()) == {1}
    assert tokens(SamplingParams(), do_sample=True, top_k=2) == {1, 2}
    assert tokens(SamplingParams(top_k=1), do_sample=True, top_k=2) == {1}
    assert tokens(SamplingParams(temperature=0), do_sample=True) == {1}
    assert tokens(SamplingParams(temperature=1e-30), do_sample=True) == {1}
    assert tokens(SamplingParams(temperature=1.0, top_k=2)) == {1, 2}
    assert Sampler(SamplingParams(), GenerationConfig(), [0], CPU).is_argmax
    penalised = SamplingParams(repetition_penalty=1.1)
    assert not Sampler(penalised, GenerationConfig(), [0], CPU).is_argmax


def test_presence_and_frequency_count_the_answer_only():
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.25)
    sampler = Sampler(params, GenerationConfig(), [2, 2, 2], CPU)
    logits = torch.tensor([0.0, 1.0, 1.9])
    seen: Counter[int] = Counter()
    for _ in range(6):
        expected = max(
            range(3),
            key=lambda t: logits[t].item() - 0.25 * seen[t] - 1.0 * (seen[t] > 0),
        )
        assert sampler.sample(logits) == expected
        seen[expected] += 1
    assert len(seen) > 1


def test_one_seed_gives_one_text_at_any_load(wild):
    def asked(seed: int | None):
        return request(
            Image.new("RGB", (64, 64), "red"),
            temperature=1.0,
            top_k=20,
            seed=seed,
            max_new_tokens=20,
            ignore_eos=True,
        )

    with running(wild, slots=8) as engine:
        alone = [finish(engine.submit(asked(seed))) for seed in range(4)]
        together = [
            engine.submit(asked(number % 4 if number % 2 else None)) for number in range(16)
        ]
        texts = [finish(sequence) for sequence in together]
    for number, text in enumerate(texts):
        if number % 2:
            assert text == alone[number % 4]
    assert len(set(alone)) == 4
    assert len(set(texts[::2])) > 1


def test_default_config_of_the_big_model_samples():
    config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    sampler = Sampler(SamplingParams(), config, [0], CPU)
    assert not sampler.is_argmax
    assert [type(step).__name__ for step in sampler._steps] == [
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
    ]


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


LOOPS = ["是", "the same line again\n", "| 1 | 2 |\n", "很好。谢谢。"]


@pytest.mark.parametrize("text", LOOPS)
def test_a_loop_is_found_soon(tokenizer, text):
    ids = tokens_of(tokenizer, "An answer that begins well. ") + tokens_of(tokenizer, text * 800)
    found = next(n for n in range(1, len(ids)) if repeats_itself(ids[:n], 512))
    begins = len(tokens_of(tokenizer, "An answer that begins well. "))
    assert 512 <= found <= begins + 512 + 1


def table(rows: int, columns: int, cell) -> str:
    head = "| " + " | ".join(f"列{n}" for n in range(columns)) + " |\n"
    head += "|" + " --- |" * columns + "\n"
    return head + "".join(
        "| " + " | ".join(cell(r, c) for c in range(columns)) + " |\n" for r in range(rows)
    )


REAL = {
    "a table of numbers": table(60, 6, lambda r, c: f"{(r * 37 + c * 101) % 1000}.{c}0"),
    "a table with the same in most cells": table(60, 5, lambda r, c: str(r) if c == 0 else "0.00"),
    "a multiplication table": table(30, 9, lambda r, c: f"{r}×{c}={r * c}"),
    "an invoice": table(50, 4, lambda r, c: ("螺丝 M4", str(r % 7 + 1), "0.15", "件")[c]),
    "an empty form": table(30, 4, lambda r, c: ""),
    "a numbered list": "".join(f"{n}. 项目\n" for n in range(1, 200)),
    "a list of days": "".join(f"- 2026-11-{d:02d}: 晴\n" for d in range(1, 31)) * 2,
    "a bar code": "||| | || ||| | | || " * 8,
    "a rule": "-" * 60 + "\n" + "=" * 60,
    "csv": "".join(f"{n},0,0,0,0\n" for n in range(150)),
    "a refrain": ("第一段各不相同的歌词。" + "啦啦啦啦\n" * 4) * 6,
}


@pytest.mark.parametrize("name", REAL)
def test_no_false_alarm_on_tables_and_lists(tokenizer, name):
    ids = tokens_of(tokenizer, REAL[name])
    assert not any(repeats_itself(ids[:n], 512) for n in range(1, len(ids) + 1, 7))


def test_short_answers_are_never_a_loop():
    assert not repeats_itself([5] * 399, 400)
    assert repeats_itself([5] * 400, 400)
    assert not repeats_itself([*range(51)] * 8, 400)  # 51 x 8 is over a limit of 400
    assert repeats_itself([*range(50)] * 8, 400)
