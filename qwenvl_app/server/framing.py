"""Where a request ends: what the worker's loop has to know before it spends a thread on it.

gunicorn's parser decides what is valid. It checks the head and a chunked body's trailers once they
are complete; of the chunks only the sizes are followed here, by its grammar.
So where a request ends is certain before anybody reads it, and stays so if nobody does: what a
proxy in front takes for one body can't be two requests here (RFC 9112, sections 7.1 and 11.2).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Generator
from typing import NamedTuple
from urllib.parse import unquote

from gunicorn.config import Config
from gunicorn.http import errors as http
from gunicorn.http.body import CHUNK_EXT_RE, LengthReader
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader

_PIECE = 64 * 1024  # bytes that gunicorn's parser gets at a time; it copies them several times
# A chunk costs the loop some microseconds and gunicorn's parser more, however small it is. 20 MB in
# chunks of 4 KB are 5,120.
_MAX_CHUNKS = 8192
# What its parser accepts as a first line, or more: a complete line that is otherwise is refused.
_REQUEST_LINE = re.compile(rb"[^ ]+ [\x21-\x7e]+ HTTP/\d\.\d")
# What can be told of a first line that is not valid, or not whole: the path, once it has ended.
_PATH = re.compile(rb"(?:\r\n)?[^ \r\n]+ (?:https?://[^/ \r\n]*)?(/[^? \r\n]*)[? ]")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]+)(?:" + CHUNK_EXT_RE.pattern + rb")")


class State(enum.Enum):
    """How far a request has come."""

    HEAD = enum.auto()  # the head is not whole yet
    BODY = enum.auto()  # the body is not
    WHOLE = enum.auto()
    REFUSED = enum.auto()  # by its head: gunicorn or the application says so, whatever else comes
    MALFORMED = enum.auto()  # a chunked body whose frame is wrong: ``fault`` says how
    TOO_LARGE = enum.auto()  # a chunked body over the limit


class Asked(NamedTuple):
    """What is asked for, as far as the request's first bytes tell, valid or not."""

    path: str  # as WSGI has it; "" if it is not known
    is_head: bool  # HEAD, whose answer has no body


class FramingLimits:
    """What all requests are held to.

    ``max_body`` is in bytes. ``wants_body`` says of a valid head whether its body is waited for.
    """

    def __init__(
        self, cfg: Config, max_body: int, wants_body: Callable[[Request], bool] = lambda _: True
    ):
        self.cfg, self.max_body, self.wants_body = cfg, max_body, wants_body
        # Its limits as gunicorn understands them: 0 and what is over its own bounds mean others.
        sample = Request(cfg, IterUnreader([b"GET / HTTP/1.1\r\n\r\n"]), ("", 0))
        self.max_line: int = sample.limit_request_line
        self.max_size_line: int = sample.limit_request_field_size
        self.max_fields: int = sample.max_buffer_headers  # of a head or a trailer section
        self.max_head = self.max_line + self.max_fields + 4


class Incoming:
    """One request of ``peer``, an address as of ``accept``, as it arrives.

    Used by the loop's thread only. ``buffer`` holds what has come, and after ``end`` what belongs
    to the connection's next request.
    """

    def __init__(self, limits: FramingLimits, peer: object = ("", 0)):
        self.buffer = bytearray()
        self.state = State.HEAD
        self.end = 0
        self.request: Request | None = None  # the head, as soon as it is whole and valid
        self.fault: Exception | None = None
        self._limits, self._peer = limits, peer
        self._line_is_whole = False  # the request line
        self._scanned = 0  # where looking for the next mark goes on
        self._body = 0  # where the body begins
        self._chunks = 0
        self._chunked = 0  # bytes that these chunks have, or announced
        self._trailer: int | None = None  # where it begins

    @property
    def has_body(self) -> bool:
        """Whether there is more than a head to this request, and all of it is here."""
        return self.state is State.WHOLE and self._body < self.end

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for 100 before it sends the body (RFC 9110, 10.1.1)."""
        if self.request is None or self.request.version < (1, 1):
            return False
        return any(name == "EXPECT" for name, _ in self.request.headers)  # others are refused

    @property
    def asked(self) -> Asked:
        """What its answer, or a refusal in its place, has to be like."""
        path = _PATH.match(self.buffer)
        is_head = self.buffer[:7].removeprefix(b"\r\n").startswith(b"HEAD ")
        return Asked(unquote(path[1].decode("latin-1")) if path else "", is_head)

    def feed(self, data: bytes | bytearray | memoryview) -> State:
        """Take more bytes; says how far the request has come."""
        self.buffer += data
        if self.state is State.HEAD:
            self.state = self._read_head()
        elif self.state is State.BODY:
            self.state = self._read_body()
        return self.state

    def drop_head(self) -> Request:
        """Of a whole request: leave ``take`` its body alone. The head, whose body is to be fed."""
        assert self.request is not None  # noqa: S101  # what is whole has a head
        del self.buffer[: self._body]
        self.end -= self._body
        self._body = 0
        return self.request

    def take(self) -> tuple[Generator[bytes, None, None], bytes]:
        """The request's bytes, in pieces that are given up as they are taken, and what follows."""
        rest = bytes(self.buffer[self.end :]) if self.state is State.WHOLE else b""
        if rest:
            del self.buffer[self.end :]
        data, self.buffer = self.buffer, bytearray()
        return _pieces(data), rest

    def _read_head(self) -> State:
        buffer = self.buffer
        start = 2 if buffer.startswith(b"\r\n") else 0  # one empty line before is allowed
        if not self._line_is_whole:
            line_end = buffer.find(b"\r\n", start)
            self._line_is_whole = line_end >= 0
            if self._line_is_whole and not _REQUEST_LINE.fullmatch(buffer, start, line_end):
                return State.REFUSED
            if not self._line_is_whole and len(buffer) - start - 2 > self._limits.max_line:
                return State.REFUSED
        head_end = buffer.find(b"\r\n\r\n", max(start, self._scanned - 3))
        if head_end >= 0:
            return self._check_head(head_end + 4)
        refused = len(buffer) > self._limits.max_head or _BARE_LF.search(buffer, self._scanned)
        self._scanned = len(buffer)
        return State.REFUSED if refused else State.HEAD

    def _check_head(self, end: int) -> State:
        try:
            head = IterUnreader([bytes(self.buffer[:end])])
            request = Request(self._limits.cfg, head, self._peer)
        except Exception:  # whatever it is: the same parser raises it again where it is answered
            return State.REFUSED
        self.request, self._body, self._scanned = request, end, end
        reader = request.body.reader if request.body else None
        if isinstance(reader, LengthReader):  # of length 0 if there is no body; else it is chunked
            if reader.length > self._limits.max_body:
                return self._refuse()
            self.end = end + reader.length
        state = self._read_body()
        return state if state is State.WHOLE or self._limits.wants_body(request) else self._refuse()

    def _refuse(self) -> State:
        """By the head: it is all that the application gets, and all that is kept."""
        del self.buffer[self._body :]
        return State.REFUSED

    def _read_body(self) -> State:
        if self.end:
            return State.WHOLE if len(self.buffer) >= self.end else State.BODY
        # The frame of a chunked body may not be much larger than what it can carry.
        if len(self.buffer) - self._body > 2 * self._limits.max_body + self._limits.max_fields:
            return State.TOO_LARGE
        state = None
        try:
            while state is None:
                state = self._read_chunk() if self._trailer is None else self._read_trailer()
        except Exception as fault:  # gunicorn's, or one of its kind
            self.fault = fault
            return State.MALFORMED
        return state

    def _read_chunk(self) -> State | None:
        """One chunk's size line, after the line end of the chunk before; None: look on."""
        buffer, start = self.buffer, self._scanned
        if len(buffer) < start + 2:
            return State.BODY
        if self._chunks:
            if not buffer.startswith(b"\r\n", start):
                raise http.ChunkMissingTerminator(bytes(buffer[start : start + 2]))
            start += 2
        line_end = buffer.find(b"\r\n", start)
        if (line_end if line_end >= 0 else len(buffer)) - start > self._limits.max_size_line:
            raise http.InvalidChunkSize(b"a line that is too long")
        if line_end < 0:
            return State.BODY
        line = _CHUNK_SIZE.fullmatch(buffer, start, line_end)
        if line is None:
            raise http.InvalidChunkSize(bytes(buffer[start:line_end]))
        size = int(line[1], 16)
        self._chunks += 1
        self._chunked += size
        if self._chunked > self._limits.max_body or self._chunks > _MAX_CHUNKS:
            return State.TOO_LARGE
        self._scanned = line_end + 2 + size
        if not size:
            self._trailer = self._scanned
        return None

    def _read_trailer(self) -> State:
        buffer, start = self.buffer, self._trailer or 0
        if buffer.startswith(b"\r\n", start):
            self.end = start + 2
            return State.WHOLE
        found = buffer.find(b"\r\n\r\n", max(start, self._scanned - 3))
        if (found if found >= 0 else len(buffer)) - start > self._limits.max_fields:
            raise http.LimitRequestHeaders("trailer section")
        if found >= 0:
            assert self.request is not None  # noqa: S101  # or there would be no body
            self.request.parse_headers(bytes(buffer[start:found]), from_trailer=True)
            self.end = found + 4
            return State.WHOLE
        if _BARE_LF.search(buffer, self._scanned):
            raise http.InvalidHeader("bare LF in a trailer")
        self._scanned = len(buffer)
        return State.BODY


def _pieces(data: bytearray) -> Generator[bytes, None, None]:
    while data:
        piece = bytes(memoryview(data)[:_PIECE])
        del data[:_PIECE]
        yield piece
