"""The limits of a form; what a form means is in test_contract.py."""

from __future__ import annotations

import io
import json

import pytest

from qwenvl_app import create_app
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend, prompt_of
from tests.contract import URLENCODED
from tests.wire import BOUNDARY, END, GOOD, IMAGE, MULTIPART, PNG, PROMPT, ROUTE, part

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
def test_limits_are_settings(backend: ScriptedBackend, body, content_type, detail):
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


def raw_image(disposition: bytes, kind: bytes = b"image/png") -> bytes:
    head = b"Content-Disposition: form-data; " + disposition + b"\r\nContent-Type: " + kind
    return f"--{BOUNDARY}\r\n".encode() + head + b"\r\n\r\n" + PNG + b"\r\n"


@pytest.mark.parametrize(
    "name",
    [
        *(
            b'"C:\\"',
            b'"\\"',
            b'"a\\\\"',
            b'"C:\\dir\\a.png"',
            b'"\\\\host\\a.png"',
            b'"a\\"b.png"',
        ),
        *(
            b'"a; name=x"',
            b'"a\\"; name=\\"x.png"',
            b'"%22a%22.png"',
            b'"a=b"',
            b'""',
            b"a.png",
            b"a\\",
        ),
        *("表".join('""').encode("cp932"), "許功蓋".join('""').encode("big5")),
        *("图片.png".join('""').encode("gbk"), b'"\xff\xfe"', b'"a', b"a b", b"'a'", b'"a" b'),
    ],
)
@pytest.mark.parametrize("form", ["name={0}; filename={1}", "filename={1}; name={0}"])
@pytest.mark.parametrize("more", ["", "; x=y", ' ; x="y"'])
def test_any_file_name_is_one(post, backend: ScriptedBackend, form, name, more):
    """A quoted one that ends in a backslash was none, and the picture came back in the error.

    What is behind a quote that never ends is part of the name, and so may be the field's name.
    """
    disposition = form.format('"image"', name.decode("latin-1")) + more
    answer = post(raw_image(disposition.encode("latin-1")) + PROMPT + END)
    if name == b'"a' and form.startswith("filename"):
        assert json.loads(answer.body)["detail"].endswith('"name" must be provided.')
    else:
        assert answer.status == 200
        assert backend.requests[0].images[0].size == (64, 64)


@pytest.mark.parametrize(
    "parameter",
    [
        *("boundary=a=b", "boundary==", "boundary=a/b:c", "boundary=a,b", "boundary=a'(b)+_.?"),
        *("boundary = a=b", "boundary= a", "boundary =a", "Boundary\t=\ta", 'boundary = "a=b"'),
        *(
            'boundary="a b"',
            "boundary=a b",
            'boundary="a\\"b"',
            "boundary=a; x=y",
            "x; boundary=a;",
        ),
        *('x="; boundary=b"; boundary=a', "boundary=b; boundary=a", "boundary=a*0", "boundary=a@b"),
    ],
)
def test_any_boundary(post, parameter):
    expected = {
        **dict.fromkeys(["boundary = a=b", 'boundary = "a=b"'], "a=b"),
        **dict.fromkeys(["boundary= a", "boundary =a", "Boundary\t=\ta"], "a"),
        **dict.fromkeys(["boundary=a; x=y", "x; boundary=a;", "boundary=b; boundary=a"], "a"),
        'boundary="a b"': "a b",
        'boundary="a\\"b"': 'a"b',
        'x="; boundary=b"; boundary=a': "a",
    }.get(parameter, parameter[len("boundary=") :])
    body = GOOD.replace(BOUNDARY.encode(), expected.encode())
    assert post(body, f"multipart/form-data; {parameter}").status == 200


@pytest.mark.parametrize(
    "near", [b"\n--%s\r\n", b"\r\n--%sx", b"\r\n--%s-", b"\r\n--%s\r", b"--%s--\r\n"]
)
@pytest.mark.parametrize("boundary", [b"b", BOUNDARY.encode()])
def test_what_is_nearly_a_boundary_is_data(post, backend: ScriptedBackend, near, boundary):
    """A line feed before one in a form whose lines end in CRLF ended the part."""
    text = b"what? " + near % boundary + b"."
    body = (IMAGE + part("prompt", text) + END).replace(BOUNDARY.encode(), boundary)
    kind = f"multipart/form-data; boundary={boundary.decode()}"
    assert post(body, kind).status == 200
    assert prompt_of(backend.requests[0]) == text.decode()


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_the_first_line_shows_how_lines_end(post, backend: ScriptedBackend, end):
    body = part("prompt", b"a\nb") + IMAGE.replace(PNG, b"PICTURE") + END
    body = body.replace(b"\r\n", end).replace(b"PICTURE", PNG)
    assert post(body).status == 200
    assert prompt_of(backend.requests[0]) == "a\nb"
    assert backend.requests[0].images[0].size == (64, 64)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 2**18 - 1, 2**18, 2**18 + 1])
def test_a_part_of_any_size_ends_where_it_should(client, backend: ScriptedBackend, size):
    """Wherever in a piece of the body that is read at once a boundary begins."""
    for filling in (b"\r", b"\r\n", b"-", f"\r\n--{BOUNDARY}"[:-1].encode()):
        filler = (filling * (size // len(filling) + 1))[:size]
        body = part("x", filler, "x") + part("prompt", b"q" * 10) + IMAGE + END
        response = client.post(ROUTE, data=body, content_type=MULTIPART)
        assert response.status_code == 200
        assert prompt_of(backend.requests.pop()) == "q" * 10


@pytest.mark.parametrize(
    "near", [b"\r\n--bx", b"\r\n--b-", b"\r\n--b\r", b"\r\n--b\t" * 2, b"\r\n--b" + b" " * 9999]
)
def test_19_mb_of_near_boundaries_are_read(client, near):
    """They hold the GIL for seconds where each is looked at on its own."""
    body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body += near * (19 * 2**20 // len(near)) + b"\r\n--b--"
    response = client.post(ROUTE, data=body, content_type="multipart/form-data; boundary=b")
    assert response.status_code == (422 if near[-1] in b"x-\r" else 400)


@pytest.mark.parametrize("field", [b"caf\xe9", b"\xff", b"\x89PNG"])
@pytest.mark.parametrize("charset", ["", "; charset=no-such-charset"])
def test_a_field_that_nobody_asked_for_is_not_judged(post, field, charset):
    other = part("x", b"", None, f"text/plain{charset}").replace(b"\r\n\r\n", b"\r\n\r\n" + field)
    unnamed = part("?", field).replace(b'"?"', b'"' + field + b'"')
    assert post(other + unnamed + GOOD).status == 200


@pytest.mark.parametrize(
    ("body", "content_type", "read"),
    [
        (b"image=%CD%BC%C6%AC", f"{URLENCODED}; charset=GBK", "图片"),
        (b"image=\xcd\xbc%C6%AC", f'{URLENCODED};Charset="gbk"', "图片"),
        (b"image=%B9%CF&_charset_=big5", URLENCODED, "圖"),
        (b"image=%D5%E2%CA%C7%CA%B2%C3%B4", URLENCODED, "这是什么"),
        ("image=图+片".encode(), URLENCODED, "图 片"),
        (b"image=%E5%9B%BE%00", URLENCODED, "图\0"),
        (b"image=caf%E9", URLENCODED, None),
        (b"image=caf\xe9", URLENCODED, None),
        (b"image=abc", f"{URLENCODED}; charset=nope", None),
    ],
)
def test_charsets_of_urlencoded_forms(post, body, content_type, read):
    """They have no picture, and so are errors; what was read is in them."""
    answer = post(body + b"&prompt=q", content_type)
    assert answer.status == (422 if read else 400)
    if read:
        assert json.loads(answer.body)["detail"][0]["input"] == read
