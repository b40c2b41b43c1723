"""Answers that have to be JSON of a schema, or calls of tools.

The model's weights are random: a trained one would write JSON by itself, and hide errors.
"""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from qwenvl_app.engine.engine import Engine
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.engine.sampling import Sampler, next_tokens
from qwenvl_app.engine.sequence import Sequence
from qwenvl_app.errors import BadSchema
from qwenvl_app.generation import (
    Constraint,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from qwenvl_app.grammar import grammars as compiling
from qwenvl_app.grammar.grammars import Grammars, Matcher
from qwenvl_app.loading.checkpoint import DEMO
from qwenvl_app.loading.load import load
from qwenvl_app.prompts.builder import Reasoning
from tests.engines import finish, random_request, request, running, spread
from tests.real_shape import ADDED
from tests.schemas import schemas

CPU = torch.device("cpu")
ENDS = {1024, 1025}
WIDTH = 1088


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    return spread(load("demo"))


@pytest.fixture(scope="module")
def engine(wild) -> Iterator[Engine]:
    """One for many tests: what it has compiled is kept."""
    with running(wild, max_new_tokens=1024, kv_cache_bytes=2**29) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokens() -> PreTrainedTokenizerBase:
    """The embedded vocabulary with the added tokens that the real one has."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


@pytest.fixture(scope="module")
def grammars(tokens) -> Grammars:
    return Grammars(tokens, WIDTH, sorted(ENDS))


def asked(constraint: Constraint | None, **sampling) -> GenerationRequest:
    settings = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 1024} | sampling
    made = request(Image.new("RGB", (64, 64), "red"), **settings)
    return dataclasses.replace(made, constraint=constraint)


def answer(sequence: Sequence) -> tuple[str, FinishReason | None]:
    deltas = list(sequence)
    return "".join(delta.text for delta in deltas), deltas[-1].finish_reason


def fits(text: str, schema: dict[str, Any]) -> None:
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize(
    ("seed", "count"),
    [(0, 8), *(pytest.param(seed, 20, marks=pytest.mark.slow) for seed in range(10))],
)
def test_every_answer_is_json_of_its_schema(engine, seed, count):
    """200 schemas in all, four answers at once. One that was cut says nothing; there are few."""
    made = schemas(seed, count)
    answers = []
    for number, schema in enumerate(made):
        sequence = engine.submit(asked(Constraint("json", schema), seed=number))
        answers.append((schema, sequence))
    cut = 0
    for schema, sequence in answers:
        text, reason = answer(sequence)
        if reason is FinishReason.LENGTH:
            cut += 1
            continue
        assert reason is FinishReason.STOP
        fits(text, schema)
    assert cut <= 1


def test_the_likeliest_tokens_are_held_to_a_schema_too(engine):
    schema = {
        "type": "object",
        "properties": {"颜色": {"enum": ["红", "green"]}, "n": {"type": "integer", "maximum": 99}},
        "required": ["颜色", "n"],
        "additionalProperties": False,
    }
    for penalty in (None, 1.3):
        limits = {"temperature": 0.0, "repetition_penalty": penalty, "presence_penalty": 0.5}
        text, reason = answer(engine.submit(asked(Constraint("json", schema), **limits)))
        assert reason is FinishReason.STOP
        fits(text, schema)


def test_who_has_no_constraint_gets_the_same_beside_those_that_have(engine):
    """And who has one gets the same alone."""
    rng = random.Random(5)
    free = [
        random_request(rng, seed=number, max_new_tokens=24, **settings)
        for number, settings in enumerate(
            [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}] * 2
        )
    ]
    bound = [
        asked(Constraint("json", schema), seed=number, max_new_tokens=40)
        for number, schema in enumerate(schemas(77, len(free)))
    ]
    requests = [each for pair in zip(free, bound, strict=True) for each in pair]
    alone = [finish(engine.submit(each)) for each in requests]
    together = [engine.submit(each) for each in requests]
    assert [finish(sequence) for sequence in together] == alone


TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "of a city",
            "parameters": {
                "type": "object",
                "$defs": {"unit": {"enum": ["°C", "°F"]}},
                "properties": {
                    "city": {"type": "string", "maxLength": 8},
                    "unit": {"$ref": "#/$defs/unit"},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
)


def calls(text: str) -> list[dict[str, Any]]:
    """As a client of Hermes' form reads them; nothing else is in ``text``."""
    found = text.split("<tool_call>\n")
    assert found[0] == ""
    bodies = [each.removesuffix("\n").removesuffix("\n</tool_call>") for each in found[1:]]
    assert "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies) == text
    return [json.loads(body) for body in bodies]


def check_calls(found: list[dict[str, Any]]) -> None:
    known = {tool["function"]["name"]: tool["function"] for tool in TOOLS}
    assert found
    for call in found:
        assert list(call) == ["name", "arguments"]
        parameters = known[call["name"]].get("parameters", {"maxProperties": 0})
        Draft202012Validator(parameters).validate(call["arguments"])


def test_calls_of_tools_are_in_the_template_s_form_and_fit_their_parameters(engine):
    names = set()
    constraint = Constraint("tools", tools=TOOLS)
    sequences = [engine.submit(asked(constraint, seed=seed)) for seed in range(12)]
    for sequence in sequences:
        text, reason = answer(sequence)
        if reason is FinishReason.STOP:
            found = calls(text)
            check_calls(found)
            names |= {call["name"] for call in found}
    assert names == {"get_weather", "now"}


def allowed(matcher: Matcher) -> set[int]:
    bits = np.frombuffer(matcher.allowed(), dtype=np.uint8)
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


def write(matcher: Matcher, rng: random.Random, most: int = 2000) -> list[int] | None:
    """Tokens at random of those that are allowed, up to the end; None if there is none."""
    written: list[int] = []
    while len(written) < most:
        choice = allowed(matcher)
        assert max(choice) < WIDTH
        token = rng.choice(sorted(choice))
        matcher.append(token)
        if token in ENDS:
            return written
        written.append(token)
    return None


def matcher_of(grammars: Grammars, constraint: Constraint, reasoning=None) -> Matcher:
    matcher = grammars.matcher(constraint, reasoning and reasoning.open_until)
    assert matcher is not None
    return matcher


def test_a_mark_that_the_vocabulary_has_is_one_token(grammars, tokens):
    begin, end = (tokens.convert_tokens_to_ids(mark) for mark in ("<tool_call>", "</tool_call>"))
    constraint = Constraint("tools", tools=TOOLS)
    assert allowed(matcher_of(grammars, constraint)) == {begin}
    for seed in range(10):
        written = write(matcher_of(grammars, constraint), random.Random(seed))
        if written is not None:
            found = calls(tokens.decode(written))
            check_calls(found)
            assert written.count(begin) == written.count(end) == len(found)


def test_one_call_where_there_may_be_no_more(grammars, tokens):
    end = tokens.convert_tokens_to_ids("</tool_call>")
    for single in (True, False):
        matcher = matcher_of(grammars, Constraint("tools", tools=TOOLS[1:], single=single))
        text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        ids = tokens.encode(text)
        assert ids[-1] == end
        for token in ids:
            assert token in allowed(matcher)
            matcher.append(token)
        assert (allowed(matcher) == ENDS) is single


def test_the_end_is_allowed_where_the_value_is_complete_and_nowhere_else(grammars, tokens):
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    for seed in range(20):
        matcher, written, rng = (
            matcher_of(grammars, Constraint("json", schema)),
            [],
            random.Random(seed),
        )
        while True:
            choice = allowed(matcher)
            try:
                fits(tokens.decode(written), schema)
            except ValueError:
                assert not choice & ENDS
            else:
                assert choice >= ENDS
                break
            written.append(rng.choice(sorted(choice)))
            matcher.append(written[-1])


@pytest.mark.parametrize("text", ["<|im_end|>x</think>", "e\u0301 \u212b", "你好，世界 " * 20])
def test_a_text_that_is_given_is_written_in_so_many_letters(grammars, tokens, text):
    """A control token that it spells is not that token, and no letters are composed."""
    for seed in range(5):
        written = write(
            matcher_of(grammars, Constraint("json", {"const": text})), random.Random(seed)
        )
        assert written is not None
        assert json.loads(tokens.decode(written)) == text
        assert not set(written) & set(tokens.added_tokens_decoder)


def test_no_control_token_is_allowed_within_a_text(grammars, tokens):
    control = set(tokens.added_tokens_decoder) - ENDS
    matcher = matcher_of(grammars, Constraint("json", {"type": "string"}))
    rng = random.Random(1)
    for _ in range(30):
        choice = allowed(matcher)
        assert not choice & control
        matcher.append(rng.choice(sorted(choice - ENDS)))


def test_a_model_that_reasons_is_held_to_nothing_before_it_has_ended_that(grammars, tokens):
    begin, end = (tokens.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>"))
    constraint = Constraint("json", {"type": "object", "maxProperties": 0})
    matcher = matcher_of(grammars, constraint, Reasoning(begin, end, begun=True))
    everything = set(range(WIDTH))
    for token in [5, 300, begin, 7]:
        assert allowed(matcher) == everything - ENDS
        matcher.append(token)
    matcher.append(end)
    written = write(matcher, random.Random(3))
    assert written is not None
    assert json.loads(tokens.decode(written)) == {}
    blank = matcher_of(grammars, constraint, Reasoning(begin, end, begun=True))
    for token in [end, *tokens.encode("\n\n"), *tokens.encode("{}")]:
        assert token in allowed(blank)
        blank.append(token)
    unbegun = matcher_of(grammars, constraint, Reasoning(begin, end, begun=False))
    assert not allowed(unbegun) & {begin, end}


def test_behind_an_end_that_is_ignored_there_are_only_ends(engine):
    asked_for = asked(Constraint("json", {"const": 1}), ignore_eos=True, max_new_tokens=12)
    text, reason = answer(engine.submit(asked_for))
    assert (text, reason) == ("1", FinishReason.LENGTH)


REFUSED = [
    ("not", {"not": {"type": "string"}}),
    ("if", {"if": {"type": "string"}, "then": {"minLength": 2}}),
    ("uniqueItems", {"type": "array", "uniqueItems": True}),
    ("contains", {"properties": {"a": {"type": "array", "contains": {"type": "string"}}}}),
    ("unevaluatedProperties", {"unevaluatedProperties": False}),
    ("dependentRequired", {"dependentRequired": {"a": ["b"]}}),
    ("propertyNames", {"propertyNames": {"pattern": "a"}}),
    ("$dynamicRef", {"$dynamicRef": "#x"}),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    ("format", {"type": "string", "format": "idn-email"}),
    ("pattern", {"type": "string", "pattern": "^(?=a)b"}),
    ("pattern", {"items": {"type": "string", "pattern": "(["}}),
    (
        "patternProperties",
        {"patternProperties": {"^a": {"type": "null"}, "b$": {"type": "string"}}},
    ),
    ("type", {"type": "text"}),
    ("required", {"required": "a"}),
    ("properties", {"properties": 5}),
    ("enum", {"enum": 5}),
    ("$ref", {"$ref": "http://127.0.0.1:9/schema.json"}),
    ("$ref", {"$ref": "#/$defs/none"}),
    ("minimum", {"type": "number", "minimum": "x"}),
]


@pytest.mark.parametrize(("keyword", "schema"), REFUSED)
def test_what_can_t_be_done_is_refused_by_name(grammars, keyword, schema):
    with pytest.raises(BadSchema) as refused:
        grammars.matcher(Constraint("json", schema), None)
    assert refused.value.status == 400
    assert keyword in str(refused.value.keyword).split(", ")
    for said in (refused.value.detail, refused.value.english):
        assert keyword in said
        assert not any(ours in said for ours in ("answer", "x-guidance", "start:", "\n"))


def test_what_may_repeat_itself_is_no_question(grammars, tokens):
    """``uniqueItems: false`` is the default, and only a keyword where keywords stand."""
    twice = {"items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": False}
    named = {"const": {"uniqueItems": False}}
    schema = {
        "type": "object",
        "properties": {"uniqueItems": {"type": "array", **twice}, "as_is": named, "no": False},
        "required": ["uniqueItems", "as_is"],
        "additionalProperties": False,
    }
    matcher = matcher_of(grammars, Constraint("json", schema))
    written = write(matcher, random.Random(0))
    assert written is not None
    found = json.loads(tokens.decode(written))
    assert found == {"uniqueItems": [1, 1], "as_is": {"uniqueItems": False}}


def test_a_schema_that_nothing_fits_is_refused(grammars):
    for schema in (
        {"enum": []},
        {"type": "string", "allOf": [{"type": "integer"}]},
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ):
        with pytest.raises(BadSchema):
            grammars.matcher(Constraint("json", schema), None)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "deep": deep(100_000),
    "huge": {"enum": [f"value {number}" for number in range(100_000)]},
    "a long text": {"const": "x" * 10_000},
    "a text that can't be": {"const": "\ud800"},
    "infinite": {"minimum": float("inf")},
    "patterns without end": {"allOf": [{"pattern": f".*[a-z]{{{n + 5}}}.*{n}"} for n in range(20)]},
    "names without end": {
        "patternProperties": {f"^[a-z]{{1,50}}{n}$": {"type": "null"} for n in range(700)}
    },
    "all of any": {
        "allOf": [{"anyOf": [{"properties": {f"{n}{m}": {}}} for m in range(6)]} for n in range(6)]
    },
    "steered": {"not": {"type": "string"}, "x-guidance": {"lenient": True}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused(grammars, name):
    """In bounded time: without bounds some of these would take minutes, or the whole memory."""
    with pytest.raises(BadSchema):
        grammars.matcher(Constraint("json", HOSTILE[name]), None)


def test_a_schema_is_compiled_once(tokens, monkeypatch):
    """Also one that is refused. What is kept is bounded."""
    checked: list[str] = []
    monkeypatch.setattr(compiling, "check_grammar", lambda text: checked.append(text) or "")
    grammars = Grammars(tokens, WIDTH, sorted(ENDS))
    for _ in range(3):
        matcher_of(grammars, Constraint("json", {"const": 1}))
        with pytest.raises(BadSchema, match="not"):
            grammars.matcher(Constraint("json", {"not": {}}), None)
    assert len(checked) == 2
    for number in range(100):
        matcher_of(grammars, Constraint("json", {"const": number + 2}))
    assert grammars._compiled.cache_info().currsize < 50


def test_sequences_of_one_schema_do_not_meet(grammars, tokens):
    """Each has its own place in the grammar, on any thread."""
    schema = {"type": "array", "items": {"type": "integer", "maximum": 500}, "maxItems": 20}
    texts: dict[int, list[int] | None] = {}

    def one(seed: int) -> None:
        matcher = matcher_of(grammars, Constraint("json", schema))
        texts[seed] = write(matcher, random.Random(seed))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, written in texts.items():
        assert written == write(
            matcher_of(grammars, Constraint("json", schema)), random.Random(seed)
        )
        assert written is None or fits(tokens.decode(written), schema) is None


def test_a_grammar_that_turns_out_too_complex_ends_its_own_row_alone(engine, monkeypatch):
    def too_complex(self: Matcher) -> bytes:
        raise BadSchema.too_complex()

    free = engine.submit(asked(None, seed=1, max_new_tokens=30, ignore_eos=True))
    monkeypatch.setattr(Matcher, "allowed", too_complex)
    bound = engine.submit(asked(Constraint("json", {"const": 1})))
    with pytest.raises(BadSchema):
        finish(bound)
    assert answer(free)[1] is FinishReason.LENGTH


def test_logits_are_left_as_they_were(grammars):
    """Whoever reads them behind the sampler, for their probabilities, reads the model's own."""
    logits = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    matcher = matcher_of(grammars, Constraint("json", {"const": 1}))
    bound = Sampler(SamplingParams(), GenerationConfig(), [1], CPU, matcher)
    free = Sampler(SamplingParams(), GenerationConfig(), [1], CPU)
    picked = next_tokens([bound, free], logits)
    assert picked[1] == int(logits[1].argmax())
    assert picked[0] != int(logits[0].argmax())
    assert torch.equal(logits, before)
