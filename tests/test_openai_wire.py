"""Requests and answers of OpenAI's API, as other servers take and give them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwenvl_app.backends.remote.failures import UpstreamError
from qwenvl_app.backends.remote.request import body_of
from qwenvl_app.backends.remote.stream import AnswerReader, events, models
from qwenvl_app.generation import (
    CALL_MARKS,
    Constraint,
    FinishReason,
    GenerationRequest,
    Message,
    SamplingParams,
    ToolCall,
    Usage,
)
from qwenvl_app.web.chat.tool_calls import CallReader

NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
DAY = {"type": "function", "function": {"name": "day"}}
HELLO = (Message("user", ("hel", "lo")),)


def sent(messages: tuple[Message, ...] = HELLO, **fields: Any) -> dict[str, Any]:
    body = body_of(GenerationRequest(messages, "id", **fields), "m", 99)
    assert sum(map(len, body.pieces)) == body.length
    return json.loads(b"".join(body.pieces))


def test_what_was_not_asked_for_is_not_sent():
    assert sent() == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 99,
    }


def test_a_penalty_has_its_own_name_at_llama_server_and_nowhere_else():
    sampling = SamplingParams(repetition_penalty=1.5)
    body = body_of(GenerationRequest(HELLO, "id", sampling), "m", 99)
    elsewhere, there = body.to("vllm"), body.to("llamacpp")
    assert json.loads(b"".join(elsewhere.pieces))["repetition_penalty"] == 1.5
    assert there.length == sum(map(len, there.pieces))
    assert json.loads(b"".join(there.pieces)) == json.loads(b"".join(elsewhere.pieces)) | {
        "repeat_penalty": 1.5,
        "repeat_last_n": 2**15,
    }
    plain = body_of(GenerationRequest(HELLO, "id"), "m", 99)
    assert plain.to("llamacpp") == plain


@pytest.mark.parametrize("required", [True, False])
def test_a_required_call_is_held_to_its_schema(required: bool):
    constraint = Constraint("tools", tools=(NOW,)) if required else None
    (told,) = sent(constraint=constraint, tools=(NOW,))["tools"]
    assert told["function"].get("strict") is (True if required else None)
    assert "strict" not in NOW["function"]


def test_the_owner_of_a_model_is_told_by_its_list():
    listed = {"data": [{"id": "a", "owned_by": "llamacpp"}, {"id": "b"}]}
    assert models(json.dumps(listed).encode())["a"] == "llamacpp"
    assert set(models(json.dumps(listed).encode())) == {"a", "b"}
    assert models(b'{"data": ["a"]}') == {}


def test_results_carry_the_ids_of_their_calls():
    turns = (
        Message("assistant", (), "why", (ToolCall("a", "now", "{}"), ToolCall("b", "day", "{}"))),
        Message("tool", ("1",)),
        Message("tool", ("2",)),
        Message("assistant", ("so",)),
    )
    told = sent(turns)["messages"]
    assert [turn.get("tool_call_id") for turn in told] == [None, "a", "b", None]
    assert told[0]["content"] is None
    assert told[0]["reasoning_content"] == "why"
    assert [call["id"] for call in told[0]["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (
            Constraint("json", {"type": "object"}),
            {"response_format": {"type": "json_object"}},
        ),
        (Constraint("tools", tools=(NOW, DAY)), {"tool_choice": "required"}),
        (
            Constraint("tools", tools=(NOW, DAY), single=True),
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            Constraint("tools", tools=(DAY,), single=True),
            {"tool_choice": {"type": "function", "function": {"name": "day"}}},
        ),
    ],
    ids=["any object", "any call", "one call", "a named call"],
)
def test_what_an_answer_has_to_be(constraint: Constraint, expected: dict[str, Any]):
    fields = sent(constraint=constraint)
    assert {name: fields[name] for name in expected} == expected


def test_a_schema_is_sent_as_it_is():
    schema = {"type": "array", "items": {"enum": ["圆", "方"]}}
    told = sent(constraint=Constraint("json", schema))["response_format"]
    assert told["json_schema"]["schema"] == schema


def test_one_call_at_most_is_no_stop_string():
    """It would be a fifth one, and OpenAI's servers take four."""
    sampling = SamplingParams(stop=("a", CALL_MARKS[1]))
    told = sent(sampling=sampling, tools=(NOW,))
    assert (told["stop"], told["parallel_tool_calls"]) == (["a"], False)


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def read(*told: dict[str, Any]) -> tuple[str, str, AnswerReader]:
    reader = AnswerReader()
    deltas = [delta for each in told if (delta := reader.read(json.dumps(each).encode()))]
    texts = "".join(delta.text for delta in deltas)
    return texts, "".join(delta.reasoning for delta in deltas), reader


def call(index: int, name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "function": {k: v for k, v in function.items() if v is not None}}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_under_both_names(field: str):
    text, reasoning, reader = read(
        chunk(role="assistant", content=""),
        chunk(**{field: "hm", "content": None}),
        chunk(content="so"),
        chunk("stop"),
    )
    assert (text, reasoning, reader.finish) == ("so", "hm", FinishReason.STOP)


def test_calls_come_back_as_they_would_from_the_model():
    """The routes read them in an answer's text, and tell the same calls again."""
    text, _, reader = read(
        chunk(content="look: "),
        chunk(tool_calls=[call(0, "now", "")]),
        chunk(tool_calls=[call(0, arguments='{"zone": "<tool')]),
        chunk(tool_calls=[call(0, arguments='_call>"}')]),
        chunk(tool_calls=[call(1, "day")]),
        chunk("tool_calls"),
    )
    message = CallReader([NOW, DAY]).message(text)
    functions = [each["function"] for each in message["tool_calls"]]
    assert functions == [
        {"name": "now", "arguments": '{"zone": "<tool_call>"}'},
        {"name": "day", "arguments": "{}"},
    ]
    assert message["content"] == "look:"
    assert reader.finish is FinishReason.STOP


@pytest.mark.parametrize(("arguments", "calls"), [('{"a": 1}', 1), ('{"a": ', 0)])
def test_a_call_at_the_limit(arguments: str, calls: int):
    """Whole, it is one; cut, it is none, and nothing is added that nobody wrote."""
    text, _, reader = read(chunk(tool_calls=[call(0, "now", arguments)]), chunk("length"))
    assert reader.finish is FinishReason.LENGTH
    assert len(CallReader([NOW]).message(text).get("tool_calls", ())) == calls
    assert calls or text.endswith(arguments)


def test_counts_that_are_null_are_none():
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": None}
    _, _, reader = read(chunk("stop"), {"choices": [], "usage": usage})
    assert reader.usage == Usage(7, 2)
    usage["prompt_tokens_details"] = {"cached_tokens": 3}
    _, _, reader = read({"choices": [], "usage": usage})
    assert reader.usage == Usage(7, 2, 3)


def test_probabilities_without_bytes():
    entry = {"token": "圆", "logprob": -0.5, "bytes": None, "top_logprobs": None}
    told = chunk(content="圆")
    told["choices"][0]["logprobs"] = {"content": [entry]}
    delta = AnswerReader().read(json.dumps(told).encode())
    assert delta
    assert [(one.text, one.bytes, one.top) for one in delta.logprobs] == [("圆", "圆".encode(), ())]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_however_they_are_cut(size: int):
    data = (
        b": hi\r\n\r\ndata: a\r\n\r\nid: 1\ndata:b\ndata: c\n\n\n\ndata: \xe5\x9c\x86\n\ndata: cut"
    )
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert list(events(pieces)) == [b"a", b"b\nc", "圆".encode()]


def test_an_event_without_an_end_is_refused():
    with pytest.raises(UpstreamError):
        list(events([b"data: "] + [b"x" * 2**20] * 5))
