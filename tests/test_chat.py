"""Chat completions around a fake backend: OpenAI's shapes, streams, and hostile bodies."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor, wait
from urllib.parse import quote

import pytest
from flask import Request
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from PIL import Image

from qwenvl_app import create_app
from qwenvl_app.errors import BadSchema, ClientGone, Unavailable
from qwenvl_app.generation import Constraint, Phase, Status
from qwenvl_app.service.deadline import Deadline
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend
from qwenvl_app.web.chat import json_body
from qwenvl_app.web.chat.schema import ChatRequest
from tests.wire import PNG

ROUTE = "/v1/chat/completions"
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
LARGE = Request({"CONTENT_LENGTH": str(2**20)})
HELLO = [{"role": "user", "content": "hello"}]


def image(url: object) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


def hello(**fields: object) -> dict:
    return {"messages": HELLO, **fields}


def said(content: object, role: object = "user", **fields: object) -> dict:
    return {"messages": [{"role": role, "content": content, **fields}]}


def events(response) -> list:
    lines = response.text.split("\n\n")
    response.close()
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer(client, backend: ScriptedBackend):
    response = client.post(ROUTE, json=hello(model="any"), headers={"X-Request-ID": "one"})
    assert response.status_code == 200
    body = response.json
    assert body.pop("created") > 0
    assert set(body.pop("timings")) == {"read_ms", "queue_ms", "image_ms"}  # a real one knows more
    assert body == {
        "id": "chatcmpl-one",
        "model": "demo",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "这是一个答案。"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 3,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert backend.requests[0].stream is False


def test_what_the_backend_is_asked(client, backend: ScriptedBackend):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [*image(URL)["messages"][0]["content"], said_part("what?")]},
        {"role": "assistant", "content": "a circle", "reasoning_content": "round"},
        {"role": "user", "content": "sure?"},
    ]
    asked = {
        "messages": messages,
        "temperature": 0,
        "top_k": 5,
        "seed": 7,
        "stop": "\n",
        "max_completion_tokens": 9,
        "logprobs": True,
        "top_logprobs": 2,
        "mm_processor_kwargs": {"max_pixels": 10000},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert client.post(ROUTE, json=asked).status_code == 200
    request = backend.requests[0]
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "user"]
    assert [picture.size for picture in request.images] == [(64, 64)]
    assert request.messages[1].content[1] == "what?"
    assert request.messages[2].reasoning == "round"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0, 5, 7)
    assert (sampling.stop, sampling.max_new_tokens) == (("\n",), 9)
    assert (request.logprobs, request.pixels) == (2, (None, 10000))
    assert request.template_options == {"enable_thinking": False}


def said_part(text: str) -> dict:
    return {"type": "text", "text": text}


def test_a_stream(client, backend: ScriptedBackend):
    asked = hello(stream=True, stream_options={"include_usage": True})
    response = client.post(ROUTE, json=asked)
    assert response.mimetype == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"
    chunks = events(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    *pieces, usage = chunks
    deltas = [chunk["choices"][0]["delta"] for chunk in pieces]
    assert "".join(delta.get("content", "") for delta in deltas) == "这是一个答案。"
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 13)
    assert backend.requests[0].stream is True


@pytest.mark.parametrize(
    ("failure", "code"), [(Unavailable.exhausted(), "memory"), (KeyError("secret"), "internal")]
)
def test_an_error_in_mid_stream(client, backend: ScriptedBackend, caplog, failure, code):
    caplog.set_level(logging.INFO)
    backend.failure = failure
    response = client.post(ROUTE, json=hello(stream=True))
    error = events(response)[-1]["error"]
    assert (error["code"], error["type"]) == (code, "server_error")
    assert error["message"].isascii()
    assert "secret" not in response.text
    lines = [record for record in caplog.records if record.name == "qwenvl_app.access"]
    assert [line.fields["reason"] for line in lines] == [code]
    samples = client.get("/metrics").text.splitlines()
    assert not [line for line in samples if "request_success_total{" in line and " 1.0" in line]


def test_an_error_before_the_first_token_has_its_status(client, backend: ScriptedBackend):
    backend.pieces, backend.failure = [], Unavailable.exhausted()
    response = client.post(ROUTE, json=hello(stream=True))
    assert (response.status_code, response.mimetype) == (503, "application/json")
    assert response.get_json()["error"]["code"] == "memory"
    assert int(response.headers["Retry-After"]) > 0


def test_the_first_piece_comes_at_once_with_what_begins_the_stream(client):
    """Each piece of the answer is a call into the kernel, and wakes the client."""
    answer = client.post(ROUTE, json=hello(stream=True), buffered=False)
    first, *_ = answer.response
    answer.close()
    role, words = (json.loads(line[6:]) for line in first.decode().split("\n\n")[:-1])
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert words["choices"][0]["delta"]["content"]


def test_a_stream_that_nobody_reads_gives_everything_back(app, backend: ScriptedBackend, caplog):
    """A generator that never ran has no finally: the close of the response releases."""
    caplog.set_level(logging.INFO)
    response = app.test_client().post(ROUTE, json=hello(stream=True), buffered=False)
    admission = app.extensions["qwenvl"]["admission"]
    assert admission.free == admission.permits - 1
    response.close()
    response.close()
    assert admission.free == admission.permits
    assert backend.generations[0].cancelled
    lines = [record for record in caplog.records if record.name == "qwenvl_app.access"]
    assert {line.fields.get("reason") for line in lines} == {"client_gone"}


def test_models(client):
    (model,) = client.get("/v1/models").json["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("demo", "model", "qwenvl")


@pytest.mark.parametrize("served", ["demo", "Qwen/Qwen3-VL-8B-Instruct", "模型 1"])
def test_a_model_by_its_id(served: str):
    settings = load_settings({"QWENVL_MODEL": served})
    client = create_app(settings, ScriptedBackend("x")).test_client()
    (listed,) = client.get("/v1/models").json["data"]
    for spelled in (quote(served), quote(served, safe="")):
        assert client.get(f"/v1/models/{spelled}").json == listed
    for other in ("other", f"{served}/", served[:-1], "..%2f..%2fetc"):
        answer = client.get(f"/v1/models/{other}")
        assert (answer.status_code, answer.mimetype) == (404, "application/json")
        assert answer.json["error"]["code"] == "model_not_found"
        assert answer.json["error"]["type"] == "invalid_request_error"
    assert client.post(f"/v1/models/{quote(served)}").json["error"]["message"]  # 405, as it is here
    for none in ("", f"/{served}", "a%0Ab"):
        answer = client.get(f"/v1/models/{none}")
        assert (answer.status_code, answer.json["error"]["message"]) == (404, "Not Found")


def test_not_ready_and_no_key(client, backend: ScriptedBackend):
    backend.phase = Status(Phase.LOADING)
    response = client.post(ROUTE, json=hello())
    assert (response.status_code, response.json["error"]["code"]) == (503, "loading")
    assert response.headers["Retry-After"] == "10"
    keyed = create_app(load_settings({"QWENVL_API_KEYS": "k"}), ScriptedBackend("x")).test_client()
    response = keyed.post(ROUTE, json=hello())
    assert response.status_code == 401
    assert response.json["error"]["type"] == "authentication_error"
    assert client.get(ROUTE).json["error"]["message"] == "Method Not Allowed"


def deep(levels: int) -> str:
    return '{"messages":' + "[" * levels + "]" * levels + "}"


BROKEN_JSON = {
    "millions of values": b'{"messages": [' + b"{}," * 2_000_000 + b"{}]}",
    "empty": b"",
    "no JSON": b"hello",
    "cut": b'{"messages": [',
    "an array": b"[]",
    "a string": b'"hello"',
    "null": b"null",
    "two values": b"{} {}",
    "a comma too many": b'{"n": 1,}',
    "a comment": b"{} // no",
    "single quotes": b"{'n': 1}",
    "NUL": b"{}\0",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"user": "\xff"}',
    "GBK": '{"user": "图片"}'.encode("gbk"),
    "UTF-16": '{"n": 1}'.encode("utf-16"),
    "a CESU surrogate": b'{"user": "\xed\xa0\x80"}',
    "a lone surrogate": rb'{"user": "\ud800"}',
    "a lone surrogate as a key": rb'{"\udc00": 1}',
    "a key twice": b'{"n": 1, "n": 1}',
    "a key twice inside": b'{"metadata": {"a": 1, "a": 2}}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": Infinity}',
    "1e999": b'{"temperature": 1e999}',
    "5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "65 levels": deep(65).encode(),
    "100,000 levels": deep(100_000).encode(),
    "20,000 keys": json.dumps({str(number): 1 for number in range(20_000)}).encode(),
    "a control character": b'{"user": "\x01"}',
}
BAD_FIELDS = {
    "no messages": {},
    "messages: none": {"messages": []},
    "messages: a string": {"messages": "hello"},
    "messages: null": {"messages": None},
    "10,000 messages": {"messages": HELLO * 10_000},
    "a message that is a string": {"messages": ["hello"]},
    "an unknown role": said("x", "robot"),
    "a role of another type": said("x", 1),
    "the role tool": said("x", "tool", tool_call_id="1"),
    "no content": {"messages": [{"role": "user"}]},
    "content: a number": said(1),
    "content: null": said(None),
    "an unknown part": said([{"type": "audio", "audio": "x"}]),
    "a part without a type": said([{"text": "x"}]),
    "a text that is a list": said([{"type": "text", "text": ["x"]}]),
    "an unknown field of a message": said("x", name2="y"),
    "an unknown field": hello(best_of=2),
    "tools: a string": hello(tools="none"),
    "audio": hello(modalities=["audio"]),
    "text and audio": hello(modalities=["text", "audio"]),
    "logit_bias": hello(logit_bias={"1": 100}),
    "n: 2": hello(n=2),
    "n: a string": hello(n="1"),
    "n: true": hello(n=True),
    "store": hello(store=True),
    "store: 0": hello(store=0),
    "a service tier": hello(service_tier="priority"),
    "reasoning_effort": hello(reasoning_effort="high"),
    "verbosity": hello(verbosity="low"),
    "a prediction": hello(prediction={"type": "content", "content": "x"}),
    "web search": hello(web_search_options={}),
    "functions": hello(functions=[]),
    "obfuscation": hello(stream=True, stream_options={"include_obfuscation": True}),
    "an unknown field that is null": hello(best_of=None),
    "a name": said("x", name="bob"),
    "a refusal": said("x", "assistant", refusal="no"),
    "an annotation": said("x", "assistant", annotations=[{}]),
    "a low detail": said(
        [{"type": "image_url", "image_url": {"url": URL, "detail": "low"}}],
    ),
    "a user of 2,000": hello(user="x" * 2000),
    "17 labels": hello(metadata={str(number): "x" for number in range(17)}),
    "a label that is a number": hello(metadata={"a": 1}),
    "a schema of 2 MB": hello(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"title": "x" * 2**21}},
        }
    ),
    "a part's type of 100,000": said([{"type": "x" * 100_000}]),
    "a key of 100,000": hello(**{"x" * 100_000: 1}),
    "a role of 100,000": said("x", "x" * 100_000),
    "temperature: a string": hello(temperature="0"),
    "temperature: -1": hello(temperature=-1),
    "temperature: 3": hello(temperature=3),
    "top_p: 0": hello(top_p=0),
    "top_p: 2": hello(top_p=2),
    "top_k: -2": hello(top_k=-2),
    "min_p: 2": hello(min_p=2),
    "presence_penalty: 3": hello(presence_penalty=3),
    "repetition_penalty: 0": hello(repetition_penalty=0),
    "repetition_penalty: tiny": hello(repetition_penalty=5e-324),
    "seed: 2**64": hello(seed=2**64),
    "seed: -2**64": hello(seed=-(2**64)),
    "seed: 1.5": hello(seed=1.5),
    "max_tokens: 0": hello(max_tokens=0),
    "max_tokens: true": hello(max_tokens=True),
    "two limits": hello(max_tokens=1, max_completion_tokens=2),
    "five stops": hello(stop=["a"] * 5),
    "an empty stop": hello(stop=""),
    "a stop of numbers": hello(stop=[1]),
    "top_logprobs alone": hello(top_logprobs=1),
    "top_logprobs: 21": hello(logprobs=True, top_logprobs=21),
    "stream: a string": hello(stream="yes"),
    "stream_options alone": hello(stream_options={"include_usage": True}),
    "a format": hello(response_format={"type": "xml"}),
    "a schema without a name": hello(
        response_format={"type": "json_schema", "json_schema": {"schema": {}}}
    ),
    "a schema that is none": hello(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}
    ),
    "a template's variable": hello(chat_template_kwargs={"messages": []}),
    "min_pixels: 0": hello(mm_processor_kwargs={"min_pixels": 0}),
    "a file": image("file:///etc/passwd"),
    "http": image("http://127.0.0.1/a.png"),
    "https": image("https://example.com/a.png"),
    "a path": image("/etc/passwd"),
    "no URL": image(""),
    "a number": image(1),
    "a picture that is text": image("data:text/plain;base64,aGVsbG8="),
    "not base64": image("data:image/png;base64,!!!!"),
    "base64 with spaces": image("data:image/png;base64,aGVs bG8="),
    "base64 that is cut": image("data:image/png;base64,aGVsbG8"),
    "Chinese in base64": image("data:image/png;base64,图片"),
    "no picture": image("data:image/png;base64,aGVsbG8="),
    "half a picture": image("data:image/png;base64," + base64.b64encode(PNG[:90]).decode()),
    "no base64 at all": image("data:image/png,hello"),
}


# What frameworks write out, and messages of answers as a client hands them back.
OPENAIS = set(CompletionCreateParamsBase.__annotations__) - {"messages"}
OURS = set(ChatRequest.model_fields) - {"messages"}
NOTHING = {name: hello(**{name: None}) for name in sorted(OPENAIS | OURS)} | {
    "defaults": hello(
        n=1,
        stop=[],
        store=False,
        service_tier="auto",
        logit_bias={},
        modalities=["text"],
        verbosity="medium",
        logprobs=False,
        top_logprobs=0,
        stream=False,
        stream_options={"include_usage": False, "include_obfuscation": False},
        presence_penalty=0,
        frequency_penalty=0,
        response_format={"type": "text"},
        chat_template_kwargs={},
        mm_processor_kwargs={},
        seed=-1,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
    ),
    "labels": hello(user="u", safety_identifier="s", prompt_cache_key="k", metadata={"a": "b"}),
    "a message of an answer": said(
        "hello",
        name=None,
        refusal=None,
        annotations=[],
        audio=None,
        function_call=None,
        tool_calls=[],
        parsed={"a": 1},
        provider_specific_fields={"refusal": None},
    ),
}


def check(response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(response.data) < 2000
    return error


@pytest.mark.parametrize("name", BROKEN_JSON)
def test_broken_json(client, backend: ScriptedBackend, name: str):
    check(client.post(ROUTE, data=BROKEN_JSON[name], content_type="application/json"))
    assert backend.requests == []


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields(client, backend: ScriptedBackend, name: str):
    error = check(client.post(ROUTE, json=BAD_FIELDS[name]))
    assert error["param"], error
    assert error["message"].startswith(error["param"].split(".")[0])
    assert backend.requests == []


@pytest.mark.parametrize("name", NOTHING)
def test_what_asks_for_nothing_changes_nothing(client, backend: ScriptedBackend, name: str):
    for asked in (hello(), NOTHING[name]):
        response = client.post(ROUTE, json=asked)
        assert response.status_code == 200, response.text
    plain, other = (
        dataclasses.replace(asked, request_id="", deadline=None) for asked in backend.requests
    )
    assert other == plain


def test_values_at_their_ends(client, backend: ScriptedBackend):
    """vLLM's -1 for all tokens, and the longest answer of another model, which is cut to ours."""
    for fields in ({"top_k": -1}, {"seed": -(2**63)}, {"max_completion_tokens": 10**6}):
        assert client.post(ROUTE, json=hello(**fields)).status_code == 200
    first, second, third = (request.sampling for request in backend.requests)
    assert (first.top_k, second.seed, third.max_new_tokens) == (-1, -(2**63), 10**6)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (BAD_FIELDS["a low detail"], "messages.0.content.0.image_url.detail"),
        (BAD_FIELDS["a text that is a list"], "messages.0.content.0.text"),
        (said([{"type": "image_url"}]), "messages.0.content.0.image_url"),
        (BAD_FIELDS["content: a number"], "messages.0.content"),
        (said([{"type": "text", "text": "x", "more": 1}]), "messages.0.content.0.more"),
        (BAD_FIELDS["five stops"], "stop"),
        (BAD_FIELDS["a stop of numbers"], "stop.0"),
        (BAD_FIELDS["a schema that is none"], "response_format.json_schema.schema"),
    ],
)
def test_the_field_is_named_as_it_stands_in_the_body(client, asked, param):
    """The name of a type of ours stood in it: messages.0.content.str."""
    assert check(client.post(ROUTE, json=asked))["param"] == param


def test_bodies_over_limits_and_of_other_types(client, settings):
    check(client.post(ROUTE, data=b"{}", content_type="text/plain"))
    check(client.post(ROUTE, data=b"{}", content_type="application/json; charset=gbk"))
    check(
        client.post(
            ROUTE, data=b" " * (settings.max_upload_mb * 2**20 + 1), content_type="application/json"
        ),
        413,
    )
    long = "x" * (settings.max_prompt_chars + 1)
    check(client.post(ROUTE, json=said(long)), 413)
    check(client.post(ROUTE, json=said("x", "assistant", reasoning_content=long)), 413)


def test_who_waits_to_read_a_large_body_has_a_deadline(backend: ScriptedBackend):
    """It waited for as long as those before it took, and longer than its client."""
    app = create_app(load_settings({}, request_timeout_s=0.2), backend)
    large = said("x" * 2**18)
    with ThreadPoolExecutor(1) as pool:
        with json_body.in_turn(LARGE, Deadline(time.monotonic() + 60)):
            waiting = pool.submit(app.test_client().post, ROUTE, json=large)
            assert wait([waiting], 5).done
        assert waiting.result().status_code == 504
    assert not json_body.turn.taken


def test_who_leaves_while_it_waits_to_have_its_body_read_waits_no_more():
    """Its thread was held until its turn came, behind two dozen bodies of 20 MB."""
    first, second, third = (Deadline(time.monotonic() + 60) for _ in range(3))

    def read(deadline: Deadline) -> None:
        with json_body.in_turn(LARGE, deadline):
            assert json_body.turn.taken

    with ThreadPoolExecutor(2) as pool:
        with json_body.in_turn(LARGE, first):
            leaving, staying = pool.submit(read, second), pool.submit(read, third)
            assert not wait([leaving, staying], 0.1).done
            second.leave()
            assert isinstance(leaving.exception(10), ClientGone)
            assert not staying.done()
        staying.result(10)
    assert not json_body.turn.taken


def test_pictures_have_one_limit_together(client, backend: ScriptedBackend, settings):
    """A small body can hold hundreds of pictures that are gigabytes once decoded."""
    side = int((settings.max_image_megapixels * 1e6 / 3) ** 0.5)
    large = io.BytesIO()
    Image.new("L", (side, side)).save(large, "PNG")
    url = "data:image/png;base64," + base64.b64encode(large.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    assert client.post(ROUTE, json=said([part] * 2)).status_code == 200
    error = check(client.post(ROUTE, json=said([part] * 300)), 413)
    assert error["message"].startswith("messages.0.content.3.image_url")
    assert len(backend.requests) == 1


def test_what_an_answer_has_to_be(client, backend: ScriptedBackend):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "x", "schema": schema, "strict": True}
    for wanted, constraint in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint("json", {"type": "object"})),
        ({"type": "json_schema", "json_schema": named}, Constraint("json", schema)),
    ):
        assert client.post(ROUTE, json=hello(response_format=wanted)).status_code == 200
        assert backend.requests.pop().constraint == constraint


def test_what_the_model_refuses_is_said_in_english(client, backend: ScriptedBackend):
    backend.failure = BadSchema("it is odd", keyword="contains")
    error = check(client.post(ROUTE, json=hello()))
    assert error["message"] == "The JSON schema is not supported (keyword: contains): it is odd."
