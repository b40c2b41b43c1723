"""What is drawn is what ``generate`` draws; what is seeded comes again."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwenvl_app.engine.drawing import SORTED, TOO_NARROW, Rules, draw
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.sampling import Sampler, next_tokens, repeats_itself
from qwenvl_app.generation import SamplingParams
from qwenvl_app.loading.load import load
from tests.engines import finish, request, running, spread

CPU = torch.device("cpu")
QWENS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}  # Qwen3-VL's own


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    return spread(load("demo"), layers=2)


def pick(sampler: Sampler, logits: torch.Tensor) -> int:
    """The next token of a sequence that is alone."""
    (token,) = next_tokens([sampler], logits[None])
    assert isinstance(token, int), token
    return token


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
    ("settings", "draws"),
    [
        (QWENS, 1500),
        *(
            pytest.param(settings, 4000, marks=pytest.mark.slow)
            for settings in (
                QWENS,
                {"temperature": 1.0, "top_k": 8},
                {"temperature": 1.5, "top_k": 12, "min_p": 0.1},
                {"temperature": 1.3, "top_k": 10, "repetition_penalty": 1.3},
                {"top_p": 0.5, "temperature": 2.0, "top_k": 0},
            )
        ),
    ],
)
def test_the_distribution_is_that_of_generate(wild, settings, draws: int):
    ids = torch.tensor([[70, 71, 300, 301, 70]])
    torch.manual_seed(0)
    with torch.inference_mode():
        logits = wild.model(input_ids=ids).logits[0, -1]
        drawn = wild.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=True,
            num_return_sequences=draws,
            **settings,
        )[:, -1]
    theirs = Counter(drawn.tolist())
    ours = Counter(
        pick(
            Sampler(
                SamplingParams(seed=seed, **settings),
                GenerationConfig(),
                ids[0].tolist(),
                CPU,
            ),
            logits,
        )
        for seed in range(draws)
    )
    value, degrees = chi_square(ours, theirs)
    assert degrees >= 2
    # Mean `degrees`, variance 2 x `degrees`: five standard deviations.
    assert value < degrees + 5 * (2 * degrees) ** 0.5, (value, degrees)


def warped(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """The chances of all tokens, as transformers' own warpers make them."""
    steps = [TemperatureLogitsWarper(rules.temperature)]
    if rules.top_k:
        steps.append(TopKLogitsWarper(rules.top_k))
    if rules.top_p < 1:
        steps.append(TopPLogitsWarper(rules.top_p))
    if rules.min_p:
        steps.append(MinPLogitsWarper(rules.min_p))
    return LogitsProcessorList(steps)(None, logits[None].float())[0].double().softmax(-1)


def drawn(logits: torch.Tensor, rules: Rules, chances: torch.Tensor) -> torch.Tensor:
    """The token for each of ``chances``, as ``next_tokens`` has it drawn."""
    scores = logits.float().expand(len(chances), -1)
    numbers = torch.tensor(rules, dtype=torch.double).expand(len(chances), -1)
    tokens = draw(scores, numbers, chances, rules.view)
    narrow = tokens == TOO_NARROW
    assert narrow.all() or not narrow.any()
    return draw(scores, numbers, chances, SORTED) if narrow.any() else tokens


def scores_of(kind: str) -> torch.Tensor:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * 4
    return {
        "all different": logits,
        "many equal": logits.bfloat16(),
        "whole numbers": logits.round(),
        "all equal": torch.ones(3000),
        "flat": logits / 100,
        "fewer than there are candidates": logits[:90],
        "most are ruled out": logits.masked_fill(torch.arange(3000) % 300 > 0, -torch.inf),
    }[kind]


KINDS = (
    *("all different", "many equal", "whole numbers", "all equal", "flat"),
    *("fewer than there are candidates", "most are ruled out"),
)
RULES = (
    Rules(0.7, 20, 0.8, 0.0),
    Rules(1.0, 1, 1.0, 0.0),
    Rules(1.5, 50, 1.0, 0.05),
    Rules(2.0, 400, 0.9, 0.0),
    Rules(1.0, 2000, 0.99, 0.0),
    Rules(1.0, 0, 0.9, 0.0),
    Rules(0.5, 0, 1.0, 0.1),
    Rules(1.0, 0, 0.0, 0.0),
    Rules(0.9, 0, 1.0, 0.0),
)


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        # Each kind with every third of the rules, and so each of these with two or three kinds.
        pytest.param(kind, rules, marks=[pytest.mark.slow] if (row + column) % 3 else [])
        for row, kind in enumerate(KINDS)
        for column, rules in enumerate(RULES)
    ],
)
def test_what_may_be_drawn_is_what_the_warpers_of_transformers_leave(kind, rules):
    """To each token its share of evenly spaced numbers; also where many are equally likely.

    Top-k lets through all that are equal to its last. Of those at top-p's end some are dropped, and
    which ones is left to a sort that is not stable: so equal ones are compared as a set.
    """
    logits, count = scores_of(kind), 2000
    chances = (torch.arange(count, dtype=torch.double) + 0.5) / count
    tokens = torch.cat([drawn(logits, rules, some) for some in chances.split(250)])
    ours, theirs = torch.bincount(tokens, minlength=len(logits)) / count, warped(logits, rules)
    ours, theirs = (each[np.lexsort((each, logits.float()))] for each in (ours, theirs))
    assert not ours[theirs == 0].any()
    assert (ours - theirs).abs().max() < 1.01 / count


def test_what_a_row_gets_does_not_depend_on_who_shares_the_batch():
    """Nor does a number drawn for one row cost another one of its own."""
    asked = [
        {},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_k": 300},
        {"temperature": 1.2, "top_k": 1500},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.8, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    ]
    logits = torch.randn(12, len(asked), 4000, generator=torch.Generator().manual_seed(1)) * 2
    logits[:, :, ::3] = logits[:, :, ::3].round()

    def samplers() -> list[Sampler]:
        return [
            Sampler(SamplingParams(seed=number, **each), GenerationConfig(), [1, 2, 3], CPU)
            for number, each in enumerate(asked)
        ]

    together = samplers()
    expected = [next_tokens(together, step) for step in logits]
    for number, alone in enumerate(samplers()):
        assert [pick(alone, step[number]) for step in logits] == [row[number] for row in expected]
    others = samplers()[::-1]
    for step, tokens in zip(logits, expected, strict=True):
        assert (
            next_tokens([*others, None], torch.cat([step.flip(0), step[:1]]))[:-1] == tokens[::-1]
        )


def test_a_row_for_which_there_is_no_token_is_alone_with_that():
    def sampler(**settings) -> Sampler:
        return Sampler(SamplingParams(seed=1, **settings), GenerationConfig(), [1], CPU)

    samplers = [
        sampler(),
        sampler(temperature=1.0),
        sampler(temperature=1.0),
        sampler(),
        None,
        sampler(temperature=1.0),
        sampler(),
        sampler(temperature=1.0, top_k=0),
    ]
    samplers[5].process = lambda scores: scores - torch.inf
    samplers[6].process = lambda _scores: 1 / 0
    samplers[7].process = lambda scores: scores * torch.nan
    logits = torch.zeros(len(samplers), 500)
    logits[:, 7] = 30.0
    for row, number in ((2, torch.nan), (3, -torch.inf), (4, torch.inf)):
        logits[row, 100] = number
    tokens = next_tokens(samplers, logits)
    assert tokens[:2] == [7, 7]
    assert [type(token) for token in tokens[2:]] == [
        *[ValueError] * 4,
        ZeroDivisionError,
        ValueError,
    ]


def test_the_checkpoint_decides_what_the_request_leaves_open():
    logits = torch.tensor([0.0, 3.0, 2.9, -5.0])

    def tokens(params: SamplingParams, **config) -> set[int]:
        return {
            pick(Sampler(params, GenerationConfig(**config), [0], CPU), logits) for _ in range(200)
        }

    assert tokens(SamplingParams()) == {1}
    assert tokens(SamplingParams(), do_sample=True, top_k=2) == {1, 2}
    assert tokens(SamplingParams(top_k=1), do_sample=True, top_k=2) == {1}
    assert tokens(SamplingParams(temperature=0), do_sample=True) == {1}
    assert tokens(SamplingParams(temperature=1e-30), do_sample=True) == {1}
    assert tokens(SamplingParams(temperature=1.0, top_k=2)) == {1, 2}
    greedy = Sampler(SamplingParams(), GenerationConfig(), [0], CPU)
    assert greedy.rng is None
    scores = logits[None]
    assert greedy.process(scores) is scores
    penalised = SamplingParams(repetition_penalty=1.1)
    assert Sampler(penalised, GenerationConfig(), [1], CPU).process(scores)[0, 1] < scores[0, 1]


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
        assert pick(sampler, logits) == expected
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
    assert sampler.rng.rules == (0.7, 20, 0.8, 0.0)
    scores = torch.zeros(1, 4)
    assert sampler.process(scores) is scores


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
