"""Reading a form from the request's stream, in memory, in the order in which it was sent.

Flask's ``request.form`` and ``request.files`` would do but for four things: a large file is put on
disk, a broken body becomes an empty form without a word, which of a field and a file of the same
name came last is forgotten, and every charset is taken for UTF-8.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import IO
from urllib.parse import parse_qsl

from flask import Request

from qwenvl_app.errors import BadRequest
from qwenvl_app.web import charsets, multipart

_CHUNK = 256 * 1024
_HINT = "请使用 UTF-8，或声明正确的字符集；文件须带文件名（filename）。"
_CHARSET_FIELD = "_charset_"  # names the charset of the others (RFC 7578 4.6)


@dataclass(frozen=True)
class Upload:
    """A file as it was sent. Its name is of no use here and not kept."""

    content_type: str | None
    data: bytes


Form = dict[str, str | Upload]


@dataclass(frozen=True)
class _Text:
    """A field that is no file, and the charset that its own part declares."""

    data: bytes
    charset: str | None = None


_Raw = dict[str, _Text | Upload]


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


def read_form(request: Request, names: Collection[str]) -> Form:
    """The fields of these names, in ASCII; of several with one name the last counts.

    A body of another type is empty. Raises BadRequest for one that is no multipart message, has
    more or larger parts than ``max_parts`` and ``max_field_kb`` allow, declares a charset that is
    not supported, or has no text where it should; RequestEntityTooLarge for one over the limit.
    """
    limits = Limits(request.max_form_parts or 0, request.max_form_memory_size or 0)
    try:
        return _read(request, {*names, _CHARSET_FIELD}, limits)
    finally:
        # A connection that is closed with bytes unread is reset, and the answer may be lost.
        while request.stream.read(_CHUNK):
            pass


def _read(request: Request, names: Collection[str], limits: Limits) -> Form:
    header = request.headers.get("Content-Type", "").encode("latin-1")
    mimetype, options = multipart.parameters(header)
    if mimetype == b"application/x-www-form-urlencoded":
        raw = _read_urlencoded(request.stream, names, limits)
    elif mimetype == b"multipart/form-data":
        if not (boundary := options.get(b"boundary")):
            raise BadRequest("Missing boundary in multipart.")
        raw = _read_parts(request.stream, boundary, names, limits)
    else:
        return {}
    return _decode(raw, _charset(options))


def _read_urlencoded(stream: IO[bytes], names: Collection[str], limits: Limits) -> _Raw:
    """No picture can be in it, so that all of it may be as large as one field."""
    data = stream.read(limits.field + 1)
    limits.check_field(len(data))
    limits.check_parts(data.count(b"&") + 1)
    # Each character a byte, whether it was escaped or not.
    pairs = parse_qsl(data.decode("latin-1"), keep_blank_values=True, encoding="latin-1")
    return {name: _Text(value.encode("latin-1")) for name, value in pairs if name in names}


def _read_parts(stream: IO[bytes], boundary: bytes, names: Collection[str], limits: Limits) -> _Raw:
    raw: _Raw = {}
    for number, part in enumerate(multipart.parts(stream, boundary), 1):
        limits.check_parts(number)
        if part.filename is None:
            limits.check_field(len(part.data))
        if (name := part.name.decode("latin-1")) in names:
            raw[name] = _value(part)
    return raw


def _value(part: multipart.Part) -> _Text | Upload:
    if part.filename is None:
        _, options = multipart.parameters(part.content_type or b"")
        return _Text(part.data, _charset(options))
    # What a browser sends for a file input that was left empty counts as not sent.
    if not part.filename and not part.data:
        return _Text(b"")
    kind = part.content_type
    return Upload(None if kind is None else charsets.show(kind), part.data)


def _charset(options: dict[bytes, bytes]) -> str | None:
    label = options.get(b"charset", b"").strip()
    return charsets.find(label) if label else None


def _decode(raw: _Raw, declared: str | None) -> Form:
    """Texts in the charset that the part declares, else the request, else ``_charset_``."""
    named = raw.pop(_CHARSET_FIELD, None)
    if isinstance(named, _Text) and named.data:
        declared = declared or charsets.find(named.data)
    form: Form = {}
    for name, value in raw.items():
        if isinstance(value, Upload):
            form[name] = value
            continue
        text = charsets.decode(value.data, value.charset or declared)
        if text is None:
            raise BadRequest(f"字段 {name} 的内容不是文本：{_HINT}")
        form[name] = text
    return form
