"""Forms against Starlette's parser, that of the service being replaced: the same fields and bytes.

Whatever it takes, ours takes and reads alike, except as the two tables say, which give the reason.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator

import pytest
from flask import Request
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser, UploadFile

from qwenvl_app.errors import BadRequest
from qwenvl_app.web.forms import Upload, read_form
from tests.forms import Maker, Meant, Sent

FORMS = 5000
NAMES = ("prompt", "image", "other", "x-1")

# Starlette refuses these or misreads them; ours reads them as they were meant.
READ = {
    "a preamble": "RFC 2046 5.1.1 has one",
    "lines that end in LF": "all of them then; Python's email package and print() write such",
    "a folded header": "RFC 5322 2.2.3; Python's email package folds at 78 characters",
    "a header line that is none": "it says nothing, and is skipped",
    "white space behind the first boundary": "RFC 2046 5.1.1; Starlette takes it behind the others",
    "more than 8 headers": "they may have 16 KiB; their number is no matter",
    "a header of more than 4,224 bytes": "they may have 16 KiB",
    "a boundary of more than 256 characters": "its length is no matter",
    "filename* alone": "urllib3 before 1.25 sends names in Chinese so; Starlette sees a text field",
    "a backslash before a quote, and more behind it": "Starlette runs two parameters together",
    "a charset of the part's own": "RFC 7578 4.4; Starlette does not look at it",
    "_charset_": "RFC 7578 4.6; to Starlette a field like any other",
    "GB18030 that nobody declared": "what curl sends on a Chinese Windows; Starlette reads Latin-1",
    "more characters than the charset has": "Windows writes them under that name",
    "UTF-8 that is declared as Latin-1": "libraries declare that by default",
    "an empty charset": "declares nothing; Starlette reads Latin-1",
}
# Starlette takes these and reads Latin-1, and the model answers nonsense.
REFUSED = {
    "an unknown charset": "nobody can read it",
    "a codec that is no charset": "Starlette uses whatever codec Python has",
    "bytes that are not of their charset": "nobody can read them",
    "bytes that are no text": "nobody can read them",
    "an empty boundary": "RFC 2046 5.1.1; any line of two hyphens would end a part",
}
# Ours may read what Starlette refuses, but what it reads is read alike.
DAMAGE = "damage"


class Pieces(io.RawIOBase):
    """A body that comes in pieces of any size."""

    def __init__(self, body: bytes, rng: random.Random):
        self._body, self._rng = io.BytesIO(body), rng

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = self._rng.choice([1, 7, 100, 4096])
        piece = self._body.read(min(len(buffer), size))
        buffer[: len(piece)] = piece
        return len(piece)


def ours(sent: Sent, rng: random.Random) -> Meant | None:
    """None: refused."""
    environ = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(len(sent.body))}
    request = Request(
        environ | {"CONTENT_TYPE": sent.content_type, "wsgi.input": Pieces(sent.body, rng)}
    )
    request.max_form_parts, request.max_form_memory_size = 1000, 2**20
    try:
        form = read_form(request, NAMES)
    except BadRequest:
        return None
    return {
        name: (value.content_type, value.data) if isinstance(value, Upload) else value
        for name, value in form.items()
    }


async def starlettes(sent: Sent, rng: random.Random) -> Meant | None:
    async def stream() -> AsyncGenerator[bytes, None]:
        body = io.BytesIO(sent.body)
        while piece := body.read(rng.choice([1, 7, 100, 4096])):
            yield piece

    headers = Headers({"Content-Type": sent.content_type})
    try:
        form = await MultiPartParser(headers, stream()).parse()
    except (MultiPartException, UnicodeError):  # the latter is a 500
        return None
    found: Meant = {}
    for name, value in form.multi_items():
        if name not in NAMES:
            continue
        if isinstance(value, UploadFile):
            data = await value.read()
            # White space around a header's value is no part of it (RFC 9110 5.5).
            kind = value.content_type and value.content_type.strip(" \t")
            # FastAPI takes a file input that was left empty for a field that was not sent.
            found[name] = (kind, data) if data or value.filename else ""
        else:
            found[name] = value
    await form.close()
    return found


def answered(form: Meant | None) -> bool:
    """Whether the route answers a form with anything but 4xx."""
    prompt, image = (form or {}).get("prompt"), (form or {}).get("image")
    if not isinstance(prompt, str) or not isinstance(image, tuple):
        return False
    return bool(prompt) and (image[0] or "").startswith("image/")


def same(mine: Meant | None, theirs: Meant | None) -> bool:
    if mine is None or theirs is None:
        return not answered(mine) and not answered(theirs)
    return mine == theirs


# Starlette does not close the files of parts that are cut off.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_random_forms(caplog):
    caplog.set_level(logging.ERROR, "python_multipart")
    rng, maker = random.Random(15), Maker(15)
    seen: Counter[str] = Counter()

    async def compare() -> None:
        for _ in range(FORMS):
            sent = maker.make()
            mine, theirs = ours(sent, rng), await starlettes(sent, rng)
            if same(mine, theirs):
                seen["answered" if answered(mine) else "refused"] += 1
                continue
            seen.update(sent.oddities)
            assert sent.oddities, (sent, mine, theirs)
            if DAMAGE in sent.oddities:
                assert theirs is None, (sent, mine, theirs)
            elif mine is None:
                assert sent.oddities & REFUSED.keys(), (sent, theirs)
            else:
                assert sent.oddities & READ.keys(), (sent, mine, theirs)
                assert mine == sent.meant, (sent, mine, theirs)

    asyncio.run(compare())
    assert seen["answered"] > FORMS // 4
    assert seen["refused"] > FORMS // 10
    assert not (READ | REFUSED).keys() - seen.keys(), "no form differs for this reason"
