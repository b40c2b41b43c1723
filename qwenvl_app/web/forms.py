"""Reading a form from the request's stream, in memory, in the order in which it was sent.

Flask's ``request.form`` and ``request.files`` would do but for three things: a large file is put
on disk, a broken body becomes an empty form without a word, and which of a field and a file of the
same name came last is forgotten. Here Werkzeug's decoder is driven directly, and what the service
being replaced (Starlette's form parser) does is done here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

from flask import Request
from werkzeug.datastructures import Headers
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import (
    Data,
    Field,
    File,
    MultipartDecoder,
    NeedData,
)

from qwenvl_app.errors import BadRequest

# Starlette's limits and words.
MAX_PARTS = 1000
MAX_FIELD = 2**20  # bytes of one field that is not a file
_CHUNK = 256 * 1024
_NO_NAME = 'The Content-Disposition header field "name" must be provided.'


@dataclass(frozen=True)
class Upload:
    """A file as it was sent. Its name is of no use here and not kept."""

    content_type: str | None
    data: bytes


Form = dict[str, str | Upload]


def read_form(request: Request) -> Form:
    """The form's fields; of several with one name the last counts. Any other body is empty.

    Raises BadRequest for a body that is no multipart message, RequestEntityTooLarge for one that
    is over the limit.
    """
    mimetype, options = parse_options_header(request.headers.get("Content-Type"))
    mimetype = mimetype.lower()
    if mimetype == "application/x-www-form-urlencoded":
        return {name: values[-1] for name, values in request.form.lists()}
    if mimetype != "multipart/form-data":
        return {}
    if not (boundary := options.get("boundary")):
        raise BadRequest("Missing boundary in multipart.")
    try:
        return _read_parts(request.stream, boundary.encode("latin-1"))
    except ValueError:
        raise BadRequest("Invalid multipart data.") from None


class _Decoder(MultipartDecoder):
    """Werkzeug's, that also takes header lines which aren't UTF-8, such as file names in GBK."""

    def _parse_headers(self, data: bytes | bytearray) -> Headers:
        try:
            data.decode()
        except UnicodeDecodeError:
            data = data.decode("latin-1").encode()
        headers = super()._parse_headers(data)
        if "Content-Disposition" not in headers:
            raise BadRequest(_NO_NAME)
        return headers


def _read_parts(stream: IO[bytes], boundary: bytes) -> Form:
    decoder, parts = _Decoder(boundary), 0
    form: Form = {}
    part: Field | File | None = None
    pieces: list[bytes] = []
    size = 0
    empty, begun = True, False
    while chunk := stream.read(_CHUNK):
        empty = False
        decoder.receive_data(chunk)
        while not isinstance(event := decoder.next_event(), NeedData):
            begun = True
            if isinstance(event, Field | File):
                if event.name is None:
                    raise BadRequest(_NO_NAME)
                if (parts := parts + 1) > MAX_PARTS:
                    raise BadRequest(f"Too many fields. Maximum number of fields is {MAX_PARTS}.")
                part, pieces, size = event, [], 0
            elif isinstance(event, Data) and part is not None:
                pieces.append(event.data)
                size += len(event.data)
                if isinstance(part, Field) and size > MAX_FIELD:
                    raise BadRequest(f"Part exceeded maximum size of {MAX_FIELD // 1024}KB.")
                if not event.more_data:
                    form[part.name] = _finish(part, b"".join(pieces))
    if not (begun or empty):
        raise ValueError("no boundary in the body")
    return form  # what was cut off is not in it, and so is reported as missing


def _finish(part: Field | File, data: bytes) -> str | Upload:
    if isinstance(part, File):
        # What a browser sends for a file input that was left empty counts as not sent.
        if not part.filename and not data:
            return ""
        return Upload(part.headers.get("Content-Type"), data)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
