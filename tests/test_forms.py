"""The limits of a form; what a form means is in test_contract.py."""

from __future__ import annotations

import io
import json

import pytest

from qwenvl_app import create_app
from qwenvl_app.settings import load_settings
from tests.contract import URLENCODED
from tests.fakes import FakeBackend
from tests.wire import BOUNDARY, END, GOOD, IMAGE, MULTIPART, ROUTE, part

TOO_MANY = "Too many fields. Maximum number of fields is 3."
TOO_LONG = "Part exceeded maximum size of 2KB."


@pytest.mark.parametrize(
    ("body", "content_type", "detail"),
    [
        (part("x", b"1") * 2 + GOOD, MULTIPART, TOO_MANY),
        (b"a=1&b=2&c=3&d=4", URLENCODED, TOO_MANY),
        (IMAGE + part("prompt", b"x" * 2049) + END, MULTIPART, TOO_LONG),
        (b"prompt=" + b"x" * 2049, URLENCODED, TOO_LONG),
    ],
    ids=["parts", "urlencoded parts", "field", "urlencoded field"],
)
def test_limits_are_settings(backend: FakeBackend, body, content_type, detail):
    app = create_app(load_settings({}, max_parts=3, max_field_kb=2), backend)
    client = app.test_client()
    response = client.post(ROUTE, data=body, content_type=content_type)
    assert (response.status_code, response.json) == (400, {"detail": detail})
    fits = part("x", b"1") + IMAGE + part("prompt", b"x" * 2048) + END
    assert client.post(ROUTE, data=fits, content_type=MULTIPART).status_code == 200


@pytest.mark.parametrize("length", [16_000, 17_000, 2**20])
def test_a_parts_headers_have_an_end(post, length):
    """They were kept, however long, and split into lines: millions of them in 20 MB."""
    head = (
        f"--{BOUNDARY}\r\nX: {'x' * length}\r\nContent-Disposition: form-data; name=x\r\n\r\n1\r\n"
    )
    answer = post(head.encode() + GOOD)
    if length < 2**14:
        assert answer.status == 200
    else:
        assert answer.status == 400
        assert json.loads(answer.body) == {"detail": "Invalid multipart data."}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (part(None, b"1") + part("x", b"1" * 2**20, "a"), MULTIPART),
        (b"x" * 2**20, MULTIPART),
        (b"{}" * 2**19, "application/json"),
        (b"x" * 2**21, URLENCODED),
        (GOOD + b"epilogue" * 2**17, MULTIPART),
    ],
    ids=["no name", "no boundary", "JSON", "urlencoded", "epilogue"],
)
def test_a_body_is_read_to_its_end_whatever_is_wrong_with_it(client, body, content_type):
    """Else the connection is reset when it is closed, and the client may never see the answer."""
    stream = io.BytesIO(body)
    client.post(ROUTE, input_stream=stream, content_length=len(body), content_type=content_type)
    assert stream.read() == b""
