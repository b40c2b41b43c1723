"""The documented route's optional fields: validated when they are sent, in FastAPI's words."""

from __future__ import annotations

import pytest

from qwenvl_app import create_app
from qwenvl_app.generation import SamplingParams
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend
from qwenvl_app.web.chat.schema import ChatRequest
from qwenvl_app.web.schema import RecognizeForm
from tests.wire import END, GOOD, IMAGE, MULTIPART, PROMPT, ROUTE, part

ANSWER = '{"status":"success","result":"这是一个答案。"}'.encode()
OPTIONAL = {*RecognizeForm.model_fields} - {"prompt", "image"}
REPETITION = load_settings({}).repetition_limit


def form(**fields: str) -> bytes:
    parts = (part(name, value.encode()) for name, value in fields.items())
    return IMAGE + PROMPT + b"".join(parts) + END


def test_without_them_nothing_is_asked_of_the_engine(post, backend: ScriptedBackend):
    assert post(GOOD).body == ANSWER
    assert backend.requests[0].sampling == SamplingParams(repetition_limit=REPETITION)


def test_what_the_engine_is_asked(post, backend: ScriptedBackend):
    body = form(
        max_new_tokens="7",
        temperature="0.5",
        top_p="0.9",
        top_k="20",
        min_p="0.1",
        repetition_penalty="1.05",
        presence_penalty="1.5",
        frequency_penalty="-2",
        seed=str(2**63 - 1),
        stop="。\n",
    )
    assert post(body).body == ANSWER
    assert backend.requests[0].sampling == SamplingParams(
        max_new_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.05,
        presence_penalty=1.5,
        frequency_penalty=-2.0,
        seed=2**63 - 1,
        stop=("。\n",),
        repetition_limit=REPETITION,
    )


def test_one_alone_leaves_the_others_to_the_checkpoint(post, backend: ScriptedBackend):
    assert post(form(temperature="0")).status == 200
    assert backend.requests[0].sampling == SamplingParams(
        temperature=0.0, repetition_limit=REPETITION
    )


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_an_empty_one_counts_as_not_sent(post, backend: ScriptedBackend, name: str):
    """And so does what a browser sends for a file input that was left empty."""
    assert post(form(**{name: ""})).body == ANSWER
    unused = part(name, b"", "", "application/octet-stream")
    assert post(IMAGE + PROMPT + unused + END).body == ANSWER
    expected = SamplingParams(repetition_limit=REPETITION)
    assert [request.sampling for request in backend.requests] == [expected] * 2


@pytest.mark.parametrize(
    "name", ["model", "max_tokens", "Temperature", "stream", "ignore_eos", "n", "x", "temperature "]
)
def test_unrelated_fields_are_ignored_as_ever(post, backend: ScriptedBackend, name: str):
    assert post(form(**{name: "\x00 whatever"})).body == ANSWER
    assert backend.requests[0].sampling == SamplingParams(repetition_limit=REPETITION)


FLOAT = "Input should be a valid number, unable to parse string as a number"
INT = "Input should be a valid integer, unable to parse string as an integer"
WRONG = [
    ("temperature", "hot", "float_parsing", FLOAT, None),
    ("temperature", " ", "float_parsing", FLOAT, None),
    ("temperature", "null", "float_parsing", FLOAT, None),
    ("temperature", "0,5", "float_parsing", FLOAT, None),
    ("temperature", "-0.1", "greater_than_equal", "greater than or equal to 0", {"ge": 0.0}),
    ("temperature", "2.1", "less_than_equal", "less than or equal to 2", {"le": 2.0}),
    ("temperature", "nan", "less_than_equal", "less than or equal to 2", {"le": 2.0}),
    ("temperature", "inf", "less_than_equal", "less than or equal to 2", {"le": 2.0}),
    ("temperature", "1e999", "less_than_equal", "less than or equal to 2", {"le": 2.0}),
    ("top_p", "0", "greater_than", "greater than 0", {"gt": 0.0}),
    ("top_p", "1.5", "less_than_equal", "less than or equal to 1", {"le": 1.0}),
    ("min_p", "-1", "greater_than_equal", "greater than or equal to 0", {"ge": 0.0}),
    ("top_k", "1.5", "int_parsing", INT, None),
    ("top_k", "-2", "greater_than_equal", "greater than or equal to -1", {"ge": -1}),
    ("top_k", str(2**31), "less_than_equal", f"less than or equal to {2**31 - 1}", None),
    ("repetition_penalty", "0", "greater_than_equal", "equal to 0.01", {"ge": 0.01}),
    ("repetition_penalty", "5e-324", "greater_than_equal", "equal to 0.01", {"ge": 0.01}),
    ("presence_penalty", "-3", "greater_than_equal", "greater than or equal to -2", {"ge": -2.0}),
    ("frequency_penalty", "nan", "less_than_equal", "less than or equal to 2", {"le": 2.0}),
    ("seed", str(-(2**64)), "greater_than_equal", f"equal to {-(2**63)}", {"ge": -(2**63)}),
    ("seed", "0x10", "int_parsing", INT, None),
    ("seed", "9" * 5000, "int_parsing_size", "exceeded maximum size", None),
    ("max_new_tokens", "0", "greater_than_equal", "greater than or equal to 1", {"ge": 1}),
    ("max_new_tokens", "1025", "less_than_equal", "less than or equal to 1024", {"le": 1024}),
    ("max_new_tokens", "many", "int_parsing", INT, None),
    ("stop", "x" * 1001, "string_too_long", "at most 1000 characters", {"max_length": 1000}),
]


@pytest.mark.parametrize(("name", "value", "kind", "said", "context"), WRONG)
def test_a_wrong_value(client, backend: ScriptedBackend, name, value, kind, said, context):
    response = client.post(ROUTE, data=form(**{name: value}), content_type=MULTIPART)
    assert response.status_code == 422
    (error,) = response.json["detail"]
    assert list(error)[:4] == ["type", "loc", "msg", "input"]
    assert (error["type"], error["loc"]) == (kind, ["body", name])
    assert said in error["msg"]
    assert error["input"] == value[:1000]
    if context:
        assert error["ctx"] == context
    assert "http" not in response.text  # pydantic adds the address of a page about the error
    assert backend.requests == []


def test_the_bytes_of_a_wrong_value(post):
    answer = post(form(temperature="-1", seed="x"))
    below = (
        '{"type":"greater_than_equal","loc":["body","temperature"],"msg":"Input should be greater '
        'than or equal to 0","input":"-1","ctx":{"ge":0.0}}'
    )
    word = f'{{"type":"int_parsing","loc":["body","seed"],"msg":"{INT}","input":"x"}}'
    assert (answer.status, answer.body.decode()) == (422, f'{{"detail":[{below},{word}]}}')


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_one_that_is_sent_as_a_file(client, backend: ScriptedBackend, name: str):
    sent = part(name, b"1", "a.txt", "text/plain")
    response = client.post(ROUTE, data=IMAGE + PROMPT + sent + END, content_type=MULTIPART)
    assert response.status_code == 422
    (error,) = response.json["detail"]
    assert (error["loc"], error["input"]) == (["body", name], None)
    assert error["type"] in {"float_type", "int_type", "string_type"}
    assert backend.requests == []


def test_of_two_with_one_name_the_last_counts(post, backend: ScriptedBackend):
    """As of two prompts."""
    wrong, right = part("temperature", b"hot"), part("temperature", b"1")
    assert post(IMAGE + PROMPT + wrong + right + END).status == 200
    assert backend.requests[0].sampling.temperature == 1
    assert post(IMAGE + PROMPT + right + wrong + END).status == 422
    # The last one is empty: none was sent.
    assert post(IMAGE + PROMPT + wrong + part("temperature", b"") + END).status == 200
    assert backend.requests[-1].sampling.temperature is None


def test_one_that_is_no_text(post, backend: ScriptedBackend):
    answer = post(IMAGE + PROMPT + part("seed", b"\xff\xfe1") + END)
    assert answer.status == 400
    assert "字段 seed 的内容不是文本".encode() in answer.body
    assert backend.requests == []


def test_one_in_the_charset_that_was_declared(post, backend: ScriptedBackend):
    sent = part("stop", "结束".encode("gbk"))
    assert post(IMAGE + PROMPT + sent + END, f"{MULTIPART}; charset=gbk").status == 200
    assert backend.requests[0].sampling.stop == ("结束",)


def test_the_most_tokens_are_the_operators():
    app = create_app(load_settings({}, max_new_tokens=5000), ScriptedBackend("x"))
    for most, status in (("5000", 200), ("5001", 422)):
        response = app.test_client().post(
            ROUTE, data=form(max_new_tokens=most), content_type=MULTIPART
        )
        assert response.status_code == status


def test_a_wrong_field_beside_missing_ones_names_them_all(client):
    response = client.post(
        ROUTE, data=form(seed="x")[len(IMAGE + PROMPT) :], content_type=MULTIPART
    )
    named = [error["loc"][-1] for error in response.json["detail"]]
    assert sorted(named) == ["image", "prompt", "seed"]


def test_both_routes_have_the_same_bounds():
    for name in OPTIONAL - {"max_new_tokens", "stop"}:
        theirs, ours = ChatRequest.model_fields[name], RecognizeForm.model_fields[name]
        assert (theirs.annotation, theirs.metadata) == (ours.annotation, ours.metadata)
        assert ours.description
