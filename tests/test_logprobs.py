"""How likely the model found its tokens, against ``generate``'s own scores."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from qwenvl_app.engine.logprobs import Score, render
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.generation import Delta, FinishReason
from qwenvl_app.grammar.grammars import Grammars
from qwenvl_app.loading.load import load
from tests.engines import inputs_of, random_request, running, spread


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    return spread(load("demo"), layers=2)


def test_logprobs_are_those_of_the_raw_logits(wild):
    """Also of who draws at random or is penalised, beside others that ask for none."""
    rng = random.Random(2)
    asked = []
    for number in range(12):
        options = rng.choice(({}, {"temperature": 0.9, "seed": number}, {"presence_penalty": 1.5}))
        each = random_request(rng, max_new_tokens=6, **options)
        wanted = rng.choice((None, 0, 3, 20))
        asked.append(dataclasses.replace(each, logprobs=wanted, stream=rng.random() < 0.5))
    with running(wild) as engine:
        sequences = [engine.submit(each) for each in asked]
        deltas: list[list[Delta]] = [list(sequence) for sequence in sequences]
    for each, sequence, parts in zip(asked, sequences, deltas, strict=True):
        found = [logprob for delta in parts for logprob in delta.logprobs]
        if each.logprobs is None:
            assert not found
            continue
        inputs = inputs_of(wild, each)
        prompt = inputs["input_ids"].shape[1]
        ids = torch.cat([inputs["input_ids"], torch.tensor([sequence.tokens])], dim=1)
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(sequence.tokens)))
        inputs |= {"input_ids": ids, "mm_token_type_ids": types}
        inputs["attention_mask"] = torch.ones_like(ids)
        with torch.inference_mode():
            logits = wild.model(**inputs).logits[0, prompt - 1 : -1].float()
        theirs = logits.log_softmax(-1)
        assert len(found) == len(sequence.tokens)
        for ours, token, row in zip(found, sequence.tokens, theirs, strict=True):
            assert ours.logprob == pytest.approx(row[token].item(), abs=1e-3)
            best = row.topk(each.logprobs).values.tolist()
            assert [top.logprob for top in ours.top] == pytest.approx(best, abs=1e-3)


def test_the_bytes_of_tokens_join_to_the_text(tokenizer):
    """A token may be a part of a character: its bytes are told as they are."""
    padded = len(tokenizer) + 1
    spellings = Grammars(tokenizer, padded, [tokenizer.eos_token_id]).spellings
    text = "图中有 🎉👩‍👩‍👧, naïve\n\tx"
    ids = tokenizer.encode(text)
    told = [render(Score(token, -1.0, ((token, -1.0),)), spellings) for token in ids]
    assert b"".join(each.bytes for each in told) == text.encode()
    assert any(each.text == "�" for each in told)
    assert all(each.top[0].bytes == each.bytes and not each.top[0].top for each in told)
    [end] = tokenizer.encode("<|im_end|>")
    assert render(Score(end, 0.0, ()), spellings).bytes == b"<|im_end|>"
    assert render(Score(padded - 1, 0.0, ()), spellings).bytes == b""


def test_what_ends_an_answer_is_not_told():
    demo = load("demo")
    rng = random.Random(1)
    with running(demo) as engine:
        asked = random_request(rng, max_new_tokens=None, ignore_eos=False)
        *_, last = deltas = list(engine.submit(dataclasses.replace(asked, logprobs=1)))
    assert last.finish_reason is FinishReason.STOP
    raw = b"".join(logprob.bytes for delta in deltas for logprob in delta.logprobs)
    assert raw.decode() == "".join(delta.text for delta in deltas)
