"""The contract through Flask's test client; ``e2e/`` sends the same over a socket."""

from __future__ import annotations

import pytest

from qwenvl_app.testing import ScriptedBackend, prompt_of
from tests.contract import FROM_SOURCE, RECORDED, Case
from tests.wire import END, IMAGE, PNG, PROMPT, ROUTE, part


@pytest.mark.parametrize("case", RECORDED + FROM_SOURCE, ids=lambda case: case.name)
def test_recorded_answers(case: Case, client, backend: ScriptedBackend):
    response = client.open(
        case.path, method=case.method, data=case.body, content_type=case.content_type
    )
    expected = case.expected.replace("...", "".join(backend.pieces))
    assert (response.status_code, response.data) == (case.status, expected.encode())
    assert response.headers["Content-Type"] == "application/json"
    for name, value in case.headers.items():
        assert response.headers[name] == value


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (IMAGE + part("prompt", b"first") + part("prompt", b"second") + END, "second"),
        (part("image", b"abc") + IMAGE + PROMPT + END, "what is the blue shape?"),
        (IMAGE + part("prompt", b"x", "p.txt", "text/plain") + part("prompt", b"y") + END, "y"),
        (part("other", b"x") + IMAGE + part("prompt", "问题".encode()) + END, "问题"),
        (IMAGE + part("prompt", b"  ") + END, "  "),
        (IMAGE + part("prompt", b"a\x00b") + END, "a\x00b"),
        # Not UTF-8: Starlette makes a Latin-1 character of every byte; it was typed as GBK.
        (IMAGE + part("prompt", "颜色".encode("gbk")) + END, "颜色"),
        (IMAGE + PROMPT + END + b"garbage behind the end", "what is the blue shape?"),
        (part("image", PNG, "", "image/png") + part("prompt", b"q") + END, "q"),
        (part("image", PNG, "a", "image/png; x=y") + part("prompt", b"q") + END, "q"),
    ],
    ids=[
        "two prompts",
        "field then file",
        "file then field",
        "unknown field",
        "blank",
        "NUL",
        "not UTF-8",
        "behind the end",
        "no file name",
        "type with a parameter",
    ],
)
def test_accepted(post, backend: ScriptedBackend, body: bytes, prompt: str):
    assert post(body).status == 200
    assert prompt_of(backend.requests[0]) == prompt


def test_of_two_images_the_last_counts(post, backend: ScriptedBackend):
    from tests.wire import picture

    first = part("image", picture(size=(10, 10)), "1.png", "image/png")
    assert post(first + IMAGE + PROMPT + END).status == 200
    assert backend.requests[0].images[0].size == (64, 64)


def test_a_file_name_in_gbk_is_no_error(post):
    """Old Windows clients send the name in the machine's code page; the original took it."""
    body = IMAGE.replace(b"a.png", "图片.png".encode("gbk")) + PROMPT + END
    assert post(body).status == 200


def test_type_and_boundary_are_read_as_headers_are(post):
    body = IMAGE + PROMPT + END
    assert post(body, 'Multipart/Form-Data; Boundary="X-BOUNDARY-X"').status == 200


def test_a_slash_at_the_end_is_the_same_route(post):
    """The original redirected there with a 307; many clients don't send a body twice."""
    assert post(IMAGE + PROMPT + END, path=ROUTE + "/").status == 200


def test_a_type_in_chinese_is_shown_as_sent(post):
    """The original showed it as Latin-1."""
    answer = post(part("image", PNG, "a", "图/片") + PROMPT + END)
    assert answer.body.decode() == '{"detail":"上传的文件必须是图片类型，但收到的是 图/片。"}'
