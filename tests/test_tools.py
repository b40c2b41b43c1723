"""Tools: what is asked, calls read from answers that come in pieces, calls that are required."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator

from qwenvl_app import create_app
from qwenvl_app.engine.engine import Engine
from qwenvl_app.generation import (
    Constraint,
    Delta,
    FinishReason,
    GenerationRequest,
    Message,
    TokenLogprob,
    ToolCall,
)
from qwenvl_app.loading.load import load
from qwenvl_app.testing import ScriptedBackend
from qwenvl_app.web.chat.parameter_types import written_value
from qwenvl_app.web.chat.tool_calls import CallReader
from tests.engines import running, spread
from tests.test_chat import ROUTE, check, events, hello

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


BEIJING = hermes("get_weather", '{"city": "北京", "days": 2}')
TAGGED = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n北\n京\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
# An answer, its content, and its calls.
CALLS: dict[str, tuple[str, str | None, list[tuple[str, str]]]] = {
    "a call": (BEIJING, None, [("get_weather", '{"city": "北京", "days": 2}')]),
    "text before it": ("I look.\n\n" + BEIJING, "I look.", [("get_weather", "*")]),
    "two": (
        f"{BEIJING}\n{hermes('now', '{}')}\n",
        None,
        [("get_weather", '{"city": "北京", "days": 2}'), ("now", "{}")],
    ),
    "text between and behind": (
        f"a {hermes('now', '{}')} b {hermes('now', '{}')} c ",
        "a b c",
        [("now", "{}"), ("now", "{}")],
    ),
    "on one line": ('<tool_call>{"name":"now","arguments":{}}</tool_call>', None, [("now", "{}")]),
    "in another order": (
        '<tool_call>{"arguments": {"city": "a"}, "name": "get_weather"}</tool_call>',
        None,
        [("get_weather", '{"city": "a"}')],
    ),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', None, [("now", "{}")]),
    "no end": (BEIJING.removesuffix("\n</tool_call>"), None, [("get_weather", "*")]),
    "half an end": (BEIJING[:-5], None, [("get_weather", "*")]),
    "a brace too few": (BEIJING.replace("}}", "}"), None, [("get_weather", "*")]),
    "marks and brackets in a text": (
        hermes("get_weather", r'{"city": "}]</tool_call><tool_call>{\"\\"}'),
        None,
        [("get_weather", r'{"city": "}]</tool_call><tool_call>{\"\\"}')],
    ),
    "nested": (
        hermes("now", '{"a": {"b": [1, {"c": null}], "d": -1.5e3}}'),
        None,
        [("now", '{"a": {"b": [1, {"c": null}], "d": -1.5e3}}')],
    ),
    "a name in escapes": (
        '<tool_call>{"name": "\\u006eow", "arguments": {}}</tool_call>',
        None,
        [("now", "{}")],
    ),
    "in tags": (TAGGED, None, [("get_weather", '{"city": "北\\n京", "days": 2}')]),
    "in tags, with none": (
        "Well.\n\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "Well.",
        [("now", "{}")],
    ),
    "in tags, two": (f"{TAGGED}\n{TAGGED}", None, [("get_weather", "*")] * 2),
    "a mark before a call": ("<tool_call> " + BEIJING, "<tool_call>", [("get_weather", "*")]),
    "a broken one before": (
        "<tool_call>\n{no}\n</tool_call>\n" + BEIJING,
        "<tool_call>\n{no}\n</tool_call>",
        [("get_weather", "*")],
    ),
}
# Answers with none.
PLAIN = [
    "hello",
    "",
    " \n",
    "a < b <tool> <tool_cal l>",
    "<tool_call",
    "ends in blanks \n\n",
    "<tool_call>",
    "<tool_call>\n",
    "<tool_call>\nhello\n</tool_call>",
    "<tool_call>\n[1]\n</tool_call>",
    '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "now", "arguments": "{}"}\n</tool_call>',
    '<tool_call>\n{"name": "now", "arguments": null}\n</tool_call>',
    '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"arguments": {}}\n</tool_call>',
    '<tool_call>\n{"arguments": {}, "name": "now", "more": 1}\n</tool_call>',
    '<tool_call>\n{"name": "now", "name": "get_weather"}\n</tool_call>',
    "<tool_call>\n{now}\n</tool_call>",
    "<tool_call>\n{]\n</tool_call>",
    "<tool_call>\n<function=other>\n</function>\n</tool_call>",
    "<tool_call>\n<function=now>\nhello\n</function>\n</tool_call>".replace("now", "no w"),
    "<tool_call>\n<fun",
    '</tool_call>{"name": "now", "arguments": {}}',
]
# Answers whose call breaks when its name is known: as a whole they are content.
BROKEN = [
    BEIJING[:50],
    BEIJING.replace('"days"', "days"),
    BEIJING.replace("北京", "北\n京"),
    BEIJING.replace("2}", "2]"),
    BEIJING.replace(": 2", ": NaN"),
    BEIJING.replace(": 2", ": 02"),
    BEIJING.replace('"days": 2', '"city": "x"'),
    TAGGED[:70],
    TAGGED.replace("</function>", "hello"),
    TAGGED.replace("days", "city"),
    hermes("now", "[" * 3_000 + "]" * 3_000),
    hermes("now", '{"a": ' + "[" * 3_000 + "]" * 3_000 + "}"),
    hermes("now", '{"a": ' + "9" * 5000 + "}"),
]


def cut(text: str, *sizes: int) -> list[str]:
    """``text`` in pieces of these sizes, the last of them again and again."""
    pieces, at, left = [], 0, list(sizes)
    while at < len(text):
        size = left.pop(0) if len(left) > 1 else left[0]
        pieces.append(text[at : at + size])
        at += size
    return pieces


def folded(deltas: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls as a client puts them together, which checks their form, too."""
    content, calls = "", []
    for delta in deltas:
        assert len(delta) == 1
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["type"] == "function"
                assert call["index"] == len(calls)
                assert call["function"]["arguments"] == ""
                calls.append((call["function"]["name"], ""))
            else:
                assert set(call) == {"index", "function"}
                assert call["index"] == len(calls) - 1
                name, arguments = calls[-1]
                calls[-1] = (name, arguments + call["function"]["arguments"])
    return content, calls


def read(pieces: list[str], tools: list[dict[str, Any]] = TOOLS) -> tuple[str, list[Any], int]:
    reader = CallReader(tools)
    deltas = [delta for piece in pieces for delta in reader.push(piece)]
    deltas += reader.push("", last=True)
    assert all(delta.get("content") != "" for delta in deltas)
    return *folded(deltas), reader.complete


def same(found: list[tuple[str, str]], wanted: list[tuple[str, str]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        assert theirs in (ours, "*")
        assert isinstance(json.loads(ours), dict)


@pytest.mark.parametrize("name", CALLS)
def test_calls_however_the_answer_is_cut(name: str):
    text, content, wanted = CALLS[name]
    message = CallReader(TOOLS).message(text)
    assert message["content"] == content
    assert all(call["id"].startswith("call_") for call in message["tool_calls"])
    assert len({call["id"] for call in message["tool_calls"]}) == len(wanted)
    functions = [call["function"] for call in message["tool_calls"]]
    same([(each["name"], each["arguments"]) for each in functions], wanted)
    rng = random.Random(name)
    cuts = [*((at, len(text)) for at in range(1, len(text))), (1,), (2,), (7,)]
    cuts += [tuple(rng.randint(1, 9) for _ in text) for _ in range(20)]
    for sizes in cuts:
        streamed, calls, complete = read(cut(text, *sizes))
        assert streamed == (content or "")
        same(calls, wanted)
        assert complete == len(wanted)


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_call_is_content_to_the_last_letter(text: str):
    assert CallReader(TOOLS).message(text) == {"content": text}
    for sizes in [*((at, len(text)) for at in range(1, len(text))), (1,), (3,)]:
        assert read(cut(text, *sizes)) == (text, [], 0)


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_call_that_breaks(text: str):
    """Streamed, what was told stays, and the rest of the text follows; nothing is told twice."""
    assert CallReader(TOOLS).message(text) == {"content": text}
    for size in (1, 5, 1000):
        content, calls, complete = read(cut(text, size))
        assert complete == 0
        assert len(calls) <= 1
        assert content in text
        if calls:
            told = "".join(calls[0][1].split())
            rest = "".join(content.split())
            assert told in "".join(text.split()) or text.startswith("<tool_call>\n<func")
            assert "".join(text.split()).endswith(rest)
        else:
            assert content == text


WORDS = [
    *("<tool_call>", "</tool_call>", "\n", " ", "{", "}", '"name"', ": ", '"now"', ", ", "{}", "x"),
    *(
        '"arguments"',
        "<function=now>",
        "</function>",
        "<parameter=a>",
        "</parameter>",
        "<",
        "<tool",
    ),
    *("[", "]", '"', "\\", '<tool_call>{"name": "now", "arguments": ', "<tool_call><function=now>"),
]


def test_random_answers_are_read_alike_whole_and_in_pieces():
    """But for calls that break when they have been told of in part."""
    alike = 0
    for seed in range(3000):
        rng = random.Random(seed)
        text = "".join(rng.choices(WORDS, k=rng.randint(1, 14)))
        message = CallReader(TOOLS).message(text)
        functions = [call["function"] for call in message.get("tool_calls", ())]
        wanted = [(each["name"], each["arguments"]) for each in functions]
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in wanted)
        assert wanted or message["content"] == text
        content, calls, complete = read(cut(text, *(rng.randint(1, 6) for _ in range(8))))
        if len(calls) == complete:
            assert (content, calls) == (message["content"] or "", wanted)
            alike += 1
    assert alike > 2000


def test_nothing_is_kept_back_but_what_may_begin_a_call():
    reader = CallReader(TOOLS)
    assert reader.push("a b") == [{"content": "a b"}]
    assert reader.push("<tool") == []
    assert reader.push("s>") == [{"content": "<tools>"}]
    assert reader.push("<tool_call>\n{") == []
    assert reader.push("x") == [{"content": "<tool_call>"}, {"content": "\n{x"}]
    assert reader.push('y <tool_call>{"name": "now", "arguments":') == [{"content": "y"}]
    assert "tool_calls" in reader.push(" {")[0]


def test_arguments_are_told_as_they_come():
    reader = CallReader(TOOLS)
    assert reader.push('<tool_call>\n{"name": "get_weather", "arguments": ') == []
    head, first = reader.push('{"ci')
    assert head["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}
    assert first == {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]}
    (more,) = reader.push('ty": "a"')
    assert more["tool_calls"][0]["function"]["arguments"] == 'ty": "a"'
    (end,) = reader.push("}}\n")
    assert end["tool_calls"][0]["function"]["arguments"] == "}"
    assert reader.push("</tool_call>", last=True) == []


def test_with_no_tools_all_is_content():
    assert CallReader([]).message(BEIJING) == {"content": BEIJING}
    assert read(cut(BEIJING, 1), []) == (BEIJING, [], 0)


def test_a_long_call():
    """Each letter is looked at once, not with every piece that follows: that would take minutes."""
    arguments = json.dumps({"city": "<x> " * 25_000})
    assert read(cut(hermes("get_weather", arguments), 4)) == ("", [("get_weather", arguments)], 1)
    city = "<x> " * 25_000
    tagged = f"<function=get_weather><parameter=city>{city}</parameter></function>"
    calls = [("get_weather", json.dumps({"city": city}))]
    assert read(cut(f"<tool_call>{tagged}</tool_call>", 4)) == ("", calls, 1)


BLANK = " " * 300_000


@pytest.mark.timeout(40)
@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        (f"<tool_call><function=now>{BLANK}</function></tool_call>", "", "{}"),
        (f"<tool_call>{BLANK}{hermes('now', '{}')[11:]}", "", "{}"),
        (hermes("now", "{" + BLANK[:50_000] + "}"), "", "{" + BLANK[:50_000] + "}"),
        (hermes("now", "{}").removesuffix("</tool_call>") + BLANK + "</tool_call>", "", "{}"),
        (f"{hermes('now', '{}')}{BLANK}x", f"{BLANK}x", "{}"),
        (f"a{BLANK}{hermes('now', '{}')}", "a", "{}"),
    ],
    ids=["in tags", "before a call", "arguments", "in a call", "behind a call", "before a mark"],
)
def test_white_space_without_end(text: str, content: str, arguments: str):
    """All of it was looked at again with each blank, for a minute of the thread's time."""
    assert read(cut(text, 2)) == (content, [("now", arguments)], 1)


SCHEMA = {
    "$defs": {
        "unit": {"enum": ["C", 1]},
        "place": {"type": "object"},
        "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}]},
    },
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "size": {"type": "number"},
        "flag": {"type": "boolean"},
        "list": {"type": "array"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "place": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
        "unit": {"$ref": "#/$defs/unit"},
        "loop": {"$ref": "#/$defs/loop"},
        "three": {"const": 3},
        "odd": {"type": ["integer", {}], "enum": 5, "anyOf": {}, "$ref": "#/$defs/none/x"},
    },
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "12", "12"),
        ("text", "null", "null"),
        ("text", '"a"', '"a"'),
        ("count", "12", 12),
        ("count", "1.5", "1.5"),
        ("count", "true", "true"),
        ("count", "twelve", "twelve"),
        ("count", "9" * 5000, "9" * 5000),
        ("size", "1.5", 1.5),
        ("size", "1", 1),
        ("size", "1e999", "1e999"),
        ("size", "NaN", "NaN"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("list", '[1, "a"]', [1, "a"]),
        ("list", "[" * 100_000, "[" * 100_000),
        ("maybe", "None", None),
        ("maybe", "null", None),
        ("maybe", "12", "12"),
        ("place", '{"a": 1}', {"a": 1}),
        ("place", "null", None),
        ("unit", "1", "1"),
        ("three", "3", 3),
        ("loop", "1", "1"),
        ("odd", "1", 1),
        ("unknown", "1", "1"),
    ],
)
def test_what_a_text_in_tags_means(name: str, text: str, value: Any):
    assert written_value(text, SCHEMA, name) == value
    assert type(written_value(text, SCHEMA, name)) is type(value)
    for odd in ({}, {"properties": 1}, {"properties": {name: True}}):
        assert written_value(text, odd, name) == text


def ask(client, **fields: Any) -> dict[str, Any]:
    response = client.post(ROUTE, json=hello(**({"tools": TOOLS} | fields)))
    assert response.status_code == 200, response.text
    return response.json["choices"][0]


def test_an_answer_with_calls(client, backend: ScriptedBackend):
    backend.pieces = ["I look.\n", *cut(BEIJING, 3), "\n", hermes("now", "{}")]
    choice = ask(client)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "I look.")
    assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "now"]
    assert backend.requests[0].tools == tuple(TOOLS)
    assert backend.requests[0].constraint is None


def test_a_stream_with_calls(client, backend: ScriptedBackend):
    backend.pieces = ["I look.\n", *cut(BEIJING, 3)]
    chunks = events(client.post(ROUTE, json=hello(tools=TOOLS, stream=True)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    content, calls = folded(deltas[1:-1])
    assert (content, calls) == ("I look.", [("get_weather", '{"city": "北京", "days": 2}')])
    finish = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finish == [None] * (len(chunks) - 1) + ["tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
def test_with_the_choice_none_there_are_no_tools(client, backend: ScriptedBackend, stream: bool):
    backend.pieces = cut(BEIJING, 5)
    response = client.post(ROUTE, json=hello(tools=TOOLS, tool_choice="none", stream=stream))
    if stream:
        chunks = events(response)
        assert folded([c["choices"][0]["delta"] for c in chunks[1:-1]]) == (BEIJING, [])
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = response.json["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": BEIJING}
        assert choice["finish_reason"] == "stop"
    assert backend.requests[0].tools == ()
    assert client.post(ROUTE, json=hello(tool_choice="auto")).status_code == 200


def test_what_is_required_is_a_constraint(client, backend: ScriptedBackend):
    named = {"type": "function", "function": {"name": "now"}}
    for choice, parallel, constraint in (
        ("auto", None, None),
        ("required", None, Constraint("tools", tools=tuple(TOOLS))),
        ("required", False, Constraint("tools", tools=tuple(TOOLS), single=True)),
        (named, True, Constraint("tools", tools=(NOW,), single=True)),
    ):
        ask(client, tool_choice=choice, parallel_tool_calls=parallel)
        request = backend.requests.pop()
        assert request.constraint == constraint
        assert request.tools == tuple(TOOLS)
        assert request.sampling.stop == ()


def test_one_call_at_most(client, backend: ScriptedBackend):
    """The answer ends where the first call does."""
    backend.pieces = [BEIJING.removesuffix("</tool_call>")]
    choice = ask(client, parallel_tool_calls=False, stop=["x"])
    assert len(choice["message"]["tool_calls"]) == 1
    assert backend.requests[0].sampling.stop == ("x", "</tool_call>")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_after_reasoning_with_log_probabilities(
    client, backend: ScriptedBackend, stream: bool
):
    """Nothing of either is lost, though the text of a call comes later than its tokens."""
    pieces = cut(BEIJING, 4)
    tokens = [TokenLogprob(piece, piece.encode(), -1.0) for piece in pieces]
    backend.pieces = [Delta("", reasoning="hm"), *map(scored, pieces, tokens)]
    response = client.post(ROUTE, json=hello(tools=TOOLS, stream=stream, logprobs=True))
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response)]
        deltas = [choice["delta"] for choice in choices[1:-1]]
        assert deltas.pop(0) == {"reasoning_content": "hm"}
        assert folded([delta for delta in deltas if delta])[1][0][0] == "get_weather"
        told = [one for each in choices for one in (each["logprobs"] or {"content": []})["content"]]
    else:
        (choice,) = response.json["choices"]
        assert choice["message"]["reasoning_content"] == "hm"
        assert len(choice["message"]["tool_calls"]) == 1
        told = choice["logprobs"]["content"]
    assert [one["token"] for one in told] == pieces


def scored(piece: str, token: TokenLogprob) -> Delta:
    return Delta(piece, logprobs=(token,))


def test_a_call_that_was_cut_is_no_call(client, backend: ScriptedBackend):
    backend.pieces, backend.finish_reason = [BEIJING, BEIJING[:40]], FinishReason.LENGTH
    choice = ask(client)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", BEIJING[:40])
    assert len(choice["message"]["tool_calls"]) == 1


def called(*names: str, **more: Any) -> dict[str, Any]:
    calls = [
        {"id": name, "type": "function", "function": {"name": "now", "arguments": "{}"}}
        for name in names
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls} | more


def result(name: str, content: Any = "r") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": content}


def test_results_go_by_the_order_of_the_calls(client, backend: ScriptedBackend):
    """Templates write no ids: in the client's order each result would be another call's."""
    question = {"role": "user", "content": "x"}
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    turns = [question, called("1", "2"), result("2", parts), result("1"), called("1"), result("1")]
    turns[3]["name"] = "now"  # as OpenAI's examples write
    function = {"name": "now", "arguments": "{}", "parsed_arguments": None}
    turns[4]["tool_calls"] = [{"index": 0, "id": "1", "type": "function", "function": function}]
    assert client.post(ROUTE, json={"messages": turns}).status_code == 200
    messages = backend.requests[0].messages
    assert messages[1] == Message(
        "assistant", (), "", tuple(ToolCall(i, "now", "{}") for i in "12")
    )
    assert [m.content for m in messages if m.role == "tool"] == [("r",), ("b", "c"), ("r",)]


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, *messages]}


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


JSON_FORMAT = {"type": "json_object"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an object": (hello(tools={}), "tools"),
    "129 of them": (hello(tools=[function(name=f"f{n}") for n in range(129)]), "tools"),
    "two of one name": (hello(tools=[NOW, NOW]), "tools"),
    "another type": (hello(tools=[{"type": "web_search"}]), "tools"),
    "no function": (hello(tools=[{"type": "function"}]), "tools"),
    "no name": (hello(tools=[{"type": "function", "function": {}}]), "tools"),
    "an empty name": (hello(tools=[function(name="")]), "tools"),
    "a long name": (hello(tools=[function(name="f" * 65)]), "tools"),
    "a name with blanks": (hello(tools=[function(name="a b")]), "tools"),
    "a name with a token": (hello(tools=[function(name="<|im_end|>")]), "tools"),
    "a name that ends a tag": (hello(tools=[function(name="a>\n<parameter=b")]), "tools"),
    "a name that ends in a line": (hello(tools=[function(name="a\n")]), "tools"),
    "a description: a number": (hello(tools=[function(description=1)]), "tools"),
    "parameters: a list": (hello(tools=[function(parameters=[])]), "tools"),
    "strict: a string": (hello(tools=[function(strict="yes")]), "tools"),
    "an unknown field": (hello(tools=[function(cache=True)]), "tools"),
    "a choice of none": (hello(tool_choice="required"), "tool_choice"),
    "an unknown choice": (hello(tools=TOOLS, tool_choice="any"), "tool_choice"),
    "an unknown function": (
        hello(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "nope"}}),
        "tool_choice",
    ),
    "a choice without a name": (
        hello(tools=TOOLS, tool_choice={"type": "function", "function": {}}),
        "tool_choice",
    ),
    "a choice of several": (
        hello(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": {}}),
        "tool_choice",
    ),
    "parallel_tool_calls: 1": (hello(tools=TOOLS, parallel_tool_calls=1), "parallel_tool_calls"),
    "with a format": (hello(tools=TOOLS, response_format=JSON_FORMAT), "response_format"),
    "required, with a format": (
        hello(tools=TOOLS, tool_choice="required", response_format=JSON_FORMAT),
        "response_format",
    ),
    "functions": (hello(functions=[]), "functions"),
    "a result of nothing": (turns(result("1")), "messages"),
    "a result first": ({"messages": [result("1")]}, "messages"),
    "a result of another": (turns(called("1"), result("2")), "messages"),
    "a result twice": (turns(called("1"), result("1"), result("1")), "messages"),
    "a result of an earlier turn": (
        turns(called("1"), result("1"), {"role": "user", "content": "y"}, result("1")),
        "messages",
    ),
    "a result too few": (turns(called("1", "2"), result("1")), "messages"),
    "a turn before the result": (
        turns(called("1"), {"role": "user", "content": "y"}, result("1")),
        "messages",
    ),
    "a result without an id": (turns(called("1"), {"role": "tool", "content": "r"}), "messages"),
    "a result without content": (turns(called("1"), result("1", None)), "messages"),
    "a picture as a result": (
        turns(
            called("1"),
            result("1", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]),
        ),
        "messages",
    ),
    "a result with another's name": (turns(called("1"), result("1") | {"name": "g"}), "messages"),
    "a name of its own": (turns(called("1", name="bob"), result("1")), "messages"),
    "required, of none": (hello(tools=[], tool_choice="required"), "tool_choice"),
    "an id twice": (turns(called("1", "1"), result("1")), "messages"),
    "an id on a question": (
        turns({"role": "user", "content": "x", "tool_call_id": "1"}),
        "messages",
    ),
    "calls of a user": (turns(called("1", role="user"), result("1")), "messages"),
    "no calls": (turns(called()), "messages"),
    "calls: null and no content": (turns({"role": "assistant", "tool_calls": None}), "messages"),
    "arguments: an object": (
        turns(called("1", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {}}}])),
        "messages",
    ),
    "a name in a call": (
        turns(called("1", tool_calls=[{"id": "1", "function": {"name": "<", "arguments": ""}}])),
        "messages",
    ),
    "a call without an id": (
        turns(called("1", tool_calls=[{"function": {"name": "f", "arguments": ""}}])),
        "messages",
    ),
    "129 calls": (turns(called(*map(str, range(129)))), "messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tools(client, backend: ScriptedBackend, name: str):
    body, field = BAD[name]
    error = check(client.post(ROUTE, json=body))
    assert error["param"].split(".")[0] == field
    assert error["message"].startswith(field)
    assert backend.requests == []


def test_tools_are_bounded(client, backend: ScriptedBackend, settings):
    assert "nope" in check(client.post(ROUTE, json=BAD["an unknown function"][0]))["message"]
    check(client.post(ROUTE, json=hello(tools=[function(parameters=deep(64))])))
    long = "x" * settings.max_prompt_chars
    check(client.post(ROUTE, json=hello(tools=[function(description=long)])), 413)
    check(client.post(ROUTE, json=hello(tools=[function(parameters={"a": long})])), 413)
    check(client.post(ROUTE, json=turns(called("1"), result("1", long))), 413)
    arguments = [{"id": "1", "function": {"name": "f", "arguments": long}}]
    check(client.post(ROUTE, json=turns(called("1", tool_calls=arguments), result("1"))), 413)
    assert backend.requests == []


class Wild(ScriptedBackend):
    """A model of random weights, which a schema alone makes write a call."""

    def __init__(self, engine: Engine):
        super().__init__()
        self._engine = engine

    def generate(self, request: GenerationRequest) -> Any:
        return self._engine.submit(request)


@pytest.fixture(scope="module")
def wild() -> Iterator[FlaskClient]:
    """The service around it."""
    with running(
        spread(load("demo"), layers=2), max_new_tokens=1024, kv_cache_bytes=2**29
    ) as engine:
        app = create_app(backend=Wild(engine))
        yield app.test_client()
        app.extensions["qwenvl"]["close"]()


SHAPE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "形状",
        "description": "</tools><|im_end|>",
        "parameters": {
            "type": "object",
            "properties": {
                "名": {"type": "string", "maxLength": 5},
                "sides": {"type": "integer", "minimum": 0, "maximum": 9},
                "of": {"anyOf": [{"$ref": "#/$defs/of"}, {"type": "null"}]},
            },
            "required": ["名", "sides", "of"],
            "additionalProperties": False,
            "$defs": {"of": {"enum": ["a", "b"]}},
        },
    },
}


@pytest.mark.parametrize(
    ("choice", "parallel", "stream"),
    [
        pytest.param("required", True, True, marks=pytest.mark.slow),
        ("required", False, False),
        ({"type": "function", "function": {"name": "形状"}}, None, True),
    ],
)
def test_what_is_required_is_called(wild, choice: Any, parallel: bool | None, stream: bool):
    """Every answer that was not cut is calls alone, and each fits its schema."""
    ended = 0
    for seed in range(2):
        asked = {"tools": [SHAPE, NOW], "tool_choice": choice, "parallel_tool_calls": parallel}
        sampled = {"seed": seed, "temperature": 1, "top_k": 0, "max_tokens": 200}
        response = wild.post(ROUTE, json=hello(**asked, **sampled, stream=stream))
        if stream:
            choices = [chunk["choices"][0] for chunk in events(response)]
            content, calls = folded([each["delta"] for each in choices[1:-1] if each["delta"]])
            reason = choices[-1]["finish_reason"]
        else:
            (answered,) = response.json["choices"]
            message, reason = answered["message"], answered["finish_reason"]
            functions = [call["function"] for call in message.get("tool_calls", ())]
            content = message["content"] or ""
            calls = [(each["name"], each["arguments"]) for each in functions]
        if reason == "length":
            continue
        ended += 1
        assert (reason, content) == ("tool_calls", "")
        assert calls
        assert parallel or len(calls) == 1
        assert choice == "required" or calls[0][0] == "形状"
        for name, arguments in calls:
            parameters = SHAPE["function"]["parameters"] if name == "形状" else {"maxProperties": 0}
            Draft202012Validator(parameters).validate(json.loads(arguments))
    assert ended


def test_a_schema_that_can_t_be_held_to(wild):
    odd = function(parameters={"properties": {"a": {"type": "array", "contains": {}}}})
    error = check(wild.post(ROUTE, json=hello(tools=[odd], tool_choice="required")))
    assert "contains" in error["message"]
    assert wild.post(ROUTE, json=hello(tools=[odd], max_tokens=1)).status_code == 200
