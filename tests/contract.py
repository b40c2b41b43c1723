"""Answers recorded from the service that this one replaces, byte for byte.

The facts of its document and of a recording of it; ``...`` in the first one stands for the text.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.wire import END, IMAGE, MULTIPART, PNG, PROMPT, ROUTE, part

MISSING_IMAGE = '{"type":"missing","loc":["body","image"],"msg":"Field required","input":null}'
MISSING_PROMPT = '{"type":"missing","loc":["body","prompt"],"msg":"Field required","input":null}'
URLENCODED = "application/x-www-form-urlencoded"


class Case(NamedTuple):
    name: str
    status: int
    expected: str
    body: bytes = b""
    content_type: str | None = MULTIPART
    method: str = "POST"
    path: str = ROUTE
    headers: dict[str, str] = {}  # noqa: RUF012


def _not_an_image(kind: str) -> str:
    return f'{{"detail":"上传的文件必须是图片类型，但收到的是 {kind}。"}}'


RECORDED = [
    Case("success", 200, '{"status":"success","result":"..."}', IMAGE + PROMPT + END),
    Case(
        "not an image",
        400,
        _not_an_image("application/octet-stream"),
        part("image", PNG, "a.bin", "application/octet-stream") + PROMPT + END,
    ),
    Case(
        "part without a content type",
        400,
        _not_an_image("None"),
        part("image", PNG, "a.png") + PROMPT + END,
    ),
    Case(
        "type is compared as sent",
        400,
        _not_an_image("Image/PNG"),
        part("image", PNG, "a.png", "Image/PNG") + PROMPT + END,
    ),
    Case("no image", 422, f'{{"detail":[{MISSING_IMAGE}]}}', b"prompt=hello", URLENCODED),
    Case("no prompt", 422, f'{{"detail":[{MISSING_PROMPT}]}}', IMAGE + END),
    Case(
        "empty prompt", 422, f'{{"detail":[{MISSING_PROMPT}]}}', IMAGE + part("prompt", b"") + END
    ),
    Case("nothing", 422, f'{{"detail":[{MISSING_PROMPT},{MISSING_IMAGE}]}}', b"", None),
    Case(
        "image as a text field",
        422,
        '{"detail":[{"type":"value_error","loc":["body","image"],"msg":"Value error, Expected '
        'UploadFile, received: <class \'str\'>","input":"abc","ctx":{"error":{}}}]}',
        part("image", b"abc") + PROMPT + END,
    ),
    Case(
        "wrong method",
        405,
        '{"detail":"Method Not Allowed"}',
        content_type=None,
        method="GET",
        headers={"allow": "POST"},
    ),
    Case(
        "wrong path",
        404,
        '{"detail":"Not Found"}',
        content_type=None,
        method="GET",
        path="/nope",
    ),
]

# Not in the recording: what the original's own source does, found by running it with a stub for
# its model, and therefore what is done here.
FROM_SOURCE = [
    Case(
        "of two prompts the last counts, and an empty one is none",
        422,
        f'{{"detail":[{MISSING_PROMPT}]}}',
        IMAGE + PROMPT + part("prompt", b"") + END,
    ),
    Case(
        "of a file and a field of one name the last counts",
        422,
        '{"detail":[{"type":"value_error","loc":["body","image"],"msg":"Value error, Expected '
        'UploadFile, received: <class \'str\'>","input":"abc","ctx":{"error":{}}}]}',
        IMAGE + part("image", b"abc") + PROMPT + END,
    ),
    Case(
        "no boundary",
        400,
        '{"detail":"Missing boundary in multipart."}',
        b"x",
        "multipart/form-data",
    ),
    Case(
        "another boundary than announced",
        400,
        '{"detail":"Invalid multipart data."}',
        IMAGE + PROMPT + END,
        "multipart/form-data; boundary=other",
    ),
    Case(
        "a part without a name",
        400,
        '{"detail":"The Content-Disposition header field \\"name\\" must be provided."}',
        part(None, b"x") + IMAGE + PROMPT + END,
    ),
    Case(
        "a part without a disposition",
        400,
        '{"detail":"The Content-Disposition header field \\"name\\" must be provided."}',
        b"--X-BOUNDARY-X\r\nContent-Type: text/plain\r\n\r\nx\r\n" + IMAGE + PROMPT + END,
    ),
    Case(
        "a body cut off in its last part",
        422,
        f'{{"detail":[{MISSING_PROMPT}]}}',
        IMAGE + PROMPT[:-5],
    ),
    Case("an empty multipart body", 422, f'{{"detail":[{MISSING_PROMPT},{MISSING_IMAGE}]}}'),
    Case(
        "JSON is no form",
        422,
        f'{{"detail":[{MISSING_PROMPT},{MISSING_IMAGE}]}}',
        b'{"prompt":"a","image":"b"}',
        "application/json",
    ),
    Case(
        "a file input left empty",
        422,
        f'{{"detail":[{MISSING_IMAGE}]}}',
        part("image", b"", "", "application/octet-stream") + PROMPT + END,
    ),
    Case(
        "names are compared as sent",
        422,
        f'{{"detail":[{MISSING_IMAGE}]}}',
        part("Image", PNG, "a.png", "image/png") + PROMPT + END,
    ),
    Case(
        "too many parts",
        400,
        '{"detail":"Too many fields. Maximum number of fields is 1000."}',
        part("x", b"1") * 1001 + END,
    ),
    Case(
        "a text field of over a megabyte",
        400,
        '{"detail":"Part exceeded maximum size of 1024KB."}',
        IMAGE + part("prompt", b"x" * (2**20 + 1)) + END,
    ),
    Case(
        "OPTIONS without a preflight's headers",
        405,
        '{"detail":"Method Not Allowed"}',
        content_type=None,
        method="OPTIONS",
        headers={"allow": "POST"},
    ),
    # Decided otherwise: the original renders the insides of its file object as the input.
    Case(
        "a prompt sent as a file",
        422,
        '{"detail":[{"type":"string_type","loc":["body","prompt"],"msg":"Input should be a valid '
        'string","input":null}]}',
        IMAGE + part("prompt", b"hello", "p.txt", "text/plain") + END,
    ),
]
