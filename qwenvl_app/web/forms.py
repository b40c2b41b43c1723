"""Reading a form from the request's stream, in memory, in the order in which it was sent.

Flask's ``request.form`` and ``request.files`` would do but for three things: a large file is put
on disk, a broken body becomes an empty form without a word, and which of a field and a file of the
same name came last is forgotten. Here Werkzeug's decoder is driven directly, and what the service
being replaced (Starlette's form parser) does is done here too.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO
from urllib.parse import parse_qsl

from flask import Request
from werkzeug.datastructures import Headers
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import (
    Data,
    Field,
    File,
    MultipartDecoder,
    NeedData,
    State,
)

from qwenvl_app.errors import BadRequest

# Bytes of one part's headers. A file name of 10,000 bytes fits; a body that is one header does not.
_MAX_HEADERS = 16 * 1024
_CHUNK = 256 * 1024
# Starlette's words.
_INVALID = "Invalid multipart data."
_NO_NAME = 'The Content-Disposition header field "name" must be provided.'


@dataclass(frozen=True)
class Upload:
    """A file as it was sent. Its name is of no use here and not kept."""

    content_type: str | None
    data: bytes


Form = dict[str, str | Upload]


@dataclass(frozen=True)
class Limits:
    """Of a form. A file is bounded by the body alone."""

    parts: int
    field: int  # bytes of one field that is not a file

    def check_parts(self, parts: int) -> None:
        """Raise BadRequest for too many."""
        if parts > self.parts:
            raise BadRequest(f"Too many fields. Maximum number of fields is {self.parts}.")

    def check_field(self, size: int) -> None:
        """Raise BadRequest for too large a one."""
        if size > self.field:
            raise BadRequest(f"Part exceeded maximum size of {self.field // 1024}KB.")


def read_form(request: Request) -> Form:
    """The form's fields; of several with one name the last counts. Any other body is empty.

    Raises BadRequest for a body that is no multipart message or has more or larger parts than
    ``max_parts`` and ``max_field_kb`` allow, RequestEntityTooLarge for one that is over the limit.
    """
    limits = Limits(request.max_form_parts or 0, request.max_form_memory_size or 0)
    try:
        return _read(request, limits)
    finally:
        # A connection that is closed with bytes unread is reset, and the answer may be lost.
        while request.stream.read(_CHUNK):
            pass


def _read(request: Request, limits: Limits) -> Form:
    mimetype, options = parse_options_header(request.headers.get("Content-Type"))
    mimetype = mimetype.lower()
    if mimetype == "application/x-www-form-urlencoded":
        return _read_urlencoded(request.stream, limits)
    if mimetype != "multipart/form-data":
        return {}
    if not (boundary := options.get("boundary")):
        raise BadRequest("Missing boundary in multipart.")
    try:
        return _read_parts(request.stream, boundary.encode("latin-1"), limits)
    except ValueError:
        raise BadRequest(_INVALID) from None


def _read_urlencoded(stream: IO[bytes], limits: Limits) -> Form:
    """No picture can be in it, so that all of it may be as large as one field."""
    data = stream.read(limits.field + 1)
    limits.check_field(len(data))
    limits.check_parts(data.count(b"&") + 1)
    return dict(parse_qsl(data.decode("utf-8", "replace"), keep_blank_values=True))


class _Decoder(MultipartDecoder):
    """Werkzeug's, that also takes header lines which aren't UTF-8, such as file names in GBK."""

    def _parse_headers(self, data: bytes | bytearray) -> Headers:
        if len(data) > _MAX_HEADERS:
            raise BadRequest(_INVALID)
        if data[:1] in (b"\r", b"\n"):  # no headers; the decoder would take the next part's
            raise BadRequest(_NO_NAME)
        try:
            data.decode()
        except UnicodeDecodeError:
            data = data.decode("latin-1").encode()
        headers = super()._parse_headers(data)
        if "Content-Disposition" not in headers:
            raise BadRequest(_NO_NAME)
        return headers


def _read_parts(stream: IO[bytes], boundary: bytes, limits: Limits) -> Form:
    decoder, parts = _Decoder(boundary), 0
    form: Form = {}
    part: Field | File | None = None
    value = io.BytesIO()
    empty, begun = True, False
    while chunk := stream.read(_CHUNK):
        empty = False
        decoder.receive_data(chunk)
        while not isinstance(event := decoder.next_event(), NeedData):
            begun = True
            if isinstance(event, Field | File):
                if event.name is None:
                    raise BadRequest(_NO_NAME)
                limits.check_parts(parts := parts + 1)
                part, value = event, io.BytesIO()
            elif isinstance(event, Data) and part is not None:
                value.write(event.data)
                if isinstance(part, Field):
                    limits.check_field(value.tell())
                if not event.more_data:
                    form[part.name] = _finish(part, value.getvalue())
        if decoder.state is State.PART and len(decoder.buffer) > _MAX_HEADERS:
            raise BadRequest(_INVALID)
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
