"""A multipart/form-data body as parts, read from a stream in one pass (RFC 7578, RFC 2046 5.1).

Whatever python-multipart takes, the parser of the service being replaced, is taken and read alike;
``tests/test_starlette_parity.py`` compares them. More is taken, as it was before: a preamble,
folded headers, lines that end in LF, ``filename*``.

Both parsers at hand were tried. 19 MB of lines that almost are a boundary hold the GIL for 3.2 s in
python-multipart, for 0.2 s here. Werkzeug's takes an LF before a boundary for the end of a part
whose lines end in CRLF, and leaves its headers to a private method.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NoReturn

from qwenvl_app.errors import BadRequest

# Bytes of one part's headers. A file name of 10,000 bytes fits; a body that is one header does not.
_MAX_HEAD = 16 * 1024
_CHUNK = 256 * 1024
# A parameter. A quoted value ends at the first quote that is not escaped (RFC 9110 5.6.4); if that
# leaves something after it, at the first quote at all, since browsers escape no backslash and in
# GBK, Big5 and Shift_JIS one may be half of a character. What is quoted in no such way, or not to
# its end, goes on to the first semicolon outside of quotes, as in Starlette.
_PARAMETER = re.compile(
    rb"""
    ;( [^=;"]*=[ \t]*"(?:[^"\\]|\\.)*+"[ \t]*(?=;|\Z)
     | [^=;"]*=[ \t]*"[^"]*"[ \t]*(?=;|\Z)
     | (?:[^";\\]|\\"?|"(?:[^"\\]|\\"?)*+(?:"|\Z))*+ )""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPED = re.compile(rb'\\(["\\])')


@dataclass(frozen=True)
class Part:
    """One part. It is a file if it has a file name, be it an empty one."""

    name: bytes
    filename: bytes | None
    content_type: bytes | None
    data: bytes


def parameters(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """A header's value in lower case, and its parameters; of two with one name the last counts."""
    first, *rest = _PARAMETER.findall(b";" + value)
    found = {}
    for parameter in rest:
        name, _, given = (piece.strip(b" \t") for piece in parameter.partition(b"="))
        if len(given) > 1 and given[:1] == given[-1:] == b'"':
            given = _ESCAPED.sub(rb"\1", given[1:-1])
        found[name.lower()] = given
    return first.strip(b" \t").lower(), found


def parts(stream: IO[bytes], boundary: bytes) -> Iterator[Part]:
    """The parts in their order, those that are complete; an empty body has none.

    Raises BadRequest for what is no multipart message, and for a part without a name.
    """
    mark, padding = b"--" + re.escape(boundary), rb"[ \t]{0,%d}" % _MAX_HEAD
    source = _Source(stream, len(mark) + _MAX_HEAD + 4)
    preamble, found = source.until(mark + rb"(?:(--)|" + padding + rb"(?=(\r?\n)))")
    if found is None:
        if preamble:
            _invalid()
        return
    last, line_end = found  # the first line shows how all of them end
    while not last:
        head, found = source.until(line_end * 2)
        if len(head) > _MAX_HEAD or line_end + b"--" + boundary in head:
            _invalid()
        if found is None:
            return
        name, filename, content_type = _read_head(head, line_end)
        data, found = source.until(
            line_end + mark + rb"(?:(--)|" + padding + rb"(?=" + line_end + rb")|([ \t]))"
        )
        if found is None:
            return
        last, stray = found
        if stray:  # a line that begins with a boundary can't be data
            _invalid()
        yield Part(name, filename, content_type, data)


class _Source:
    """A stream that is read up to what a pattern matches. No match is longer than ``longest``."""

    def __init__(self, stream: IO[bytes], longest: int):
        self._stream = stream
        self._longest = longest
        self._buffer = bytearray()
        self._ended = False

    def until(self, pattern: bytes) -> tuple[bytes, tuple[bytes, ...] | None]:
        """What is before the first match, and its groups; at the end all that is left, and None."""
        search = re.compile(pattern).search
        before = io.BytesIO()
        while True:
            match = search(self._buffer)
            # A match in what comes later than this may yet turn out another, or be none yet.
            settled = len(self._buffer) if self._ended else len(self._buffer) - self._longest
            if match and match.start() < settled:
                groups, end = match.groups(), match.end()
                before.write(self._buffer[: match.start()])
                del self._buffer[:end]
                return before.getvalue(), groups
            if settled > 0:
                before.write(self._buffer[:settled])
                del self._buffer[:settled]
            if self._ended:
                return before.getvalue(), None
            chunk = self._stream.read(_CHUNK)
            self._ended = not chunk
            self._buffer += chunk


def _read_head(head: bytes, line_end: bytes) -> tuple[bytes, bytes | None, bytes | None]:
    """Name, file name and type. Of two dispositions the last counts, of two types the first."""
    disposition, content_type = b"", None
    for line in re.sub(line_end + rb"[ \t]+", b" ", head).split(line_end):
        name, _, value = (piece.strip(b" \t") for piece in line.partition(b":"))
        if name.lower() == b"content-disposition":
            disposition = value
        elif name.lower() == b"content-type" and content_type is None:
            content_type = value
    _, options = parameters(disposition)
    if b"name" not in options:
        raise BadRequest('The Content-Disposition header field "name" must be provided.')
    # Not in a form's parts, says RFC 7578; urllib3 before 1.25 wrote names in Chinese only so.
    filename = options.get(b"filename", options.get(b"filename*"))
    return options[b"name"], filename, content_type


def _invalid() -> NoReturn:
    raise BadRequest("Invalid multipart data.")  # Starlette's words
