"""``/openapi.json`` says what the service does, and ``/docs`` has all that it needs.

``tests/conftest.py`` holds what all other tests see of the routes to the document.
"""

from __future__ import annotations

import json
import re

import pytest
from flask import Response
from openapi_spec_validator import validate

from qwenvl_app import create_app
from qwenvl_app.errors import Unavailable
from qwenvl_app.settings import load_settings
from qwenvl_app.web.chat.schema import ChatRequest
from qwenvl_app.web.openapi import answers, chat_answers, docs, examples
from qwenvl_app.web.schema import RecognizeForm
from tests import declared
from tests.declared import DOCUMENT, path_of, problems, resolve
from tests.test_docs import LANGUAGES, read
from tests.wire import GOOD, MULTIPART, ROUTE

CHAT = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "hello"}]}
OPERATIONS = {
    (path, method): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}


def test_it_is_valid():
    assert DOCUMENT["openapi"].startswith("3.1.")
    validate(DOCUMENT)


def test_every_route_stands_in_it(app):
    """But the page for people, and the files of which pages are made."""
    routes = {
        (path_of(rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
        if not rule.rule.startswith("/docs/") and not rule.endpoint.startswith("page.")
    }
    assert routes == set(OPERATIONS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_status_of_the_errors_table_stands_in_it(language: str):
    rows = re.findall(r"^\| (\d{3}.*?) \|", read(f"docs/errors{language}.md"), re.MULTILINE)
    listed = {status for row in rows for status in re.findall(r"\d{3}", row)}
    told = {status for operation in OPERATIONS.values() for status in operation["responses"]}
    assert told - {"200", "304"} == listed


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_errors_that_it_quotes_are_told(language: str):
    """``…`` in the table stands for what varies."""
    details = re.findall(r"`([^`]+)`", read(f"docs/errors{language}.md"))
    patterns = [re.escape(text).replace("…", ".+") for text in details]
    for detail in examples.DETAILS.values():
        assert any(re.fullmatch(pattern, detail) for pattern in patterns), detail


def test_fields_are_those_of_the_models():
    schemas = DOCUMENT["components"]["schemas"]
    for model in (RecognizeForm, ChatRequest):
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert set(schemas[model.__name__]["properties"]) == names


def contents():
    """Everything that has a schema and examples."""
    for (path, method), operation in OPERATIONS.items():
        told = {"request": operation["requestBody"]} if "requestBody" in operation else {}
        told |= {status: resolve(answer) for status, answer in operation["responses"].items()}
        for which, body in told.items():
            for kind, content in body["content"].items():
                yield pytest.param(content, id=f"{method} {path} {which} {kind}")


@pytest.mark.parametrize("content", list(contents()))
def test_examples_fit_their_schemas(content):
    values = [content["example"]] if "example" in content else []
    values += [example["value"] for example in content.get("examples", {}).values()]
    for value in values:
        assert not problems(value, content["schema"])
        if "data" in value:  # of an event; JSON in it is not judged by jsonschema
            _, told = content["schema"]["properties"]["data"]["anyOf"]
            assert not problems(json.loads(value["data"]), told["contentSchema"])


def test_questions_and_answers_are_shown_in_both_languages():
    assert set(examples.ANSWER) == set(examples.CHAT_ANSWER) == {"chinese", "english"}
    assert DOCUMENT["components"]["schemas"]["RecognizeForm"]["properties"]["prompt"]["examples"]
    for operation in OPERATIONS.values():
        assert operation["summary"]


def events(answer) -> list[str]:
    return re.findall(r"^data: (.*)$", answer.text, re.MULTILINE)


def test_answers_have_no_field_that_is_not_declared(client):
    answer = client.post(ROUTE, data=GOOD, content_type=MULTIPART)
    answers.RecognizeAnswer.model_validate(answer.json, extra="forbid")
    asked = {"data": GOOD, "content_type": MULTIPART, "headers": {"Accept": "text/event-stream"}}
    *pieces, last = events(client.post(ROUTE, **asked, buffered=True))
    assert len(pieces) == 3
    for piece in pieces:
        answers.RecognizeDelta.model_validate_json(piece, extra="forbid")
    answers.RecognizeEnd.model_validate_json(last, extra="forbid")


def test_chat_answers_have_no_field_that_is_not_declared(client):
    asked = ASKED | {"logprobs": True, "top_logprobs": 1}
    chat_answers.ChatCompletion.model_validate(client.post(CHAT, json=asked).json, extra="forbid")
    asked = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = events(client.post(CHAT, json=asked, buffered=True))
    assert (len(chunks) > 3, done) == (True, "[DONE]")
    for chunk in chunks:
        chat_answers.ChatCompletionChunk.model_validate_json(chunk, extra="forbid")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_declared(client, backend, stream: bool):
    backend.pieces = ['<tool_call>\n{"name": "look", "arguments": {"at": 1}}', "\n</tool_call>"]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    answer = client.post(CHAT, json=ASKED | {"tools": [tool], "stream": stream}, buffered=True)
    assert '"tool_calls"' in answer.text and '"look"' in answer.text
    if not stream:
        chat_answers.ChatCompletion.model_validate(answer.json, extra="forbid")
    else:
        for chunk in events(answer)[:-1]:
            chat_answers.ChatCompletionChunk.model_validate_json(chunk, extra="forbid")


def test_what_is_got_has_no_field_that_is_not_declared(client):
    for path, model in (
        ("/v1/models", chat_answers.ModelList),
        ("/v1/models/demo", chat_answers.Model),
        ("/livez", answers.Alive),
        ("/readyz", answers.Readiness),
    ):
        model.model_validate(client.get(path).json, extra="forbid")


def test_errors_are_declared(client, backend):
    """The fixture ``app`` compares each with the document."""
    wrong = client.post(CHAT, json={"messages": 1})
    chat_answers.ChatError.model_validate(wrong.json, extra="forbid")
    missing = client.post(ROUTE)
    answers.FormError.model_validate(missing.json, extra="forbid")
    backend.refusal = Unavailable.exhausted()
    for path, more in ((ROUTE, {"data": GOOD, "content_type": MULTIPART}), (CHAT, {"json": ASKED})):
        busy = client.post(path, **more)
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Response("{}", 418, mimetype="application/json"), "418 is not declared"),
        (Response("{}", mimetype="application/json"), "has no X-Request-ID"),
        (Response("", headers={"X-Request-ID": "1"}, mimetype="text/html"), "200 is text/html"),
        (
            Response("{}", headers={"X-Request-ID": "1"}, mimetype="application/json"),
            "'status' is a required property",
        ),
    ],
)
def test_the_comparison_can_fail(answer: Response, problem: str):
    assert problem in (declared.wrong(ROUTE, "POST", answer) or "")


@pytest.fixture
def guarded(backend):
    return create_app(load_settings({"QWENVL_API_KEYS": "a-key"}), backend).test_client()


def test_no_key_is_needed_to_read_it(guarded):
    for path in docs.PATHS:
        assert guarded.get(path).status_code == 200
    for path in ("/docs/other", "/docs/", "/docs/..%2fdocs", "/v1/models"):
        assert guarded.get(path).status_code == 401
    told = guarded.get("/openapi.json").json
    assert told == DOCUMENT
    assert told["paths"][ROUTE]["post"]["security"] == [{"key": []}, {}]


def test_the_page_asks_for_nothing_but_what_is_here(client):
    page = client.get("/docs")
    wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(wanted) == 4
    assert {f"/{path}" for path in wanted} | {"/docs", "/openapi.json"} == docs.PATHS
    assert "<script>" not in page.text and "'unsafe" not in page.headers["Content-Security-Policy"]


@pytest.mark.parametrize("name", ["oauth2-redirect.html", "..%2f__init__.py", "VERSION", "%00"])
def test_no_other_file_is_served(client, name):
    answer = client.get(f"/docs/{name}")
    assert (answer.status_code, answer.json) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("path", sorted(docs.PATHS))
def test_nothing_is_sent_twice(client, path):
    first = client.get(path)
    again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
