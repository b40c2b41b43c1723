"""Where a request ends: what the worker's loop has to know before it spends a thread on it.

gunicorn's parser stays the judge of what is valid. Of the head it is asked itself, once the head is
whole; of a chunked body only the frame is followed here. Bytes that it would refuse are handed to
it at once, so that it says so.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Generator

from gunicorn.config import Config
from gunicorn.http.body import LengthReader
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader

_PIECE = 64 * 1024  # bytes that gunicorn's parser gets at a time; it copies them several times
# A chunk costs the loop some microseconds and gunicorn's parser more, however small it is. 20 MB in
# chunks of 4 KB are 5,120.
_MAX_CHUNKS = 8192
# What its parser accepts as a first line, or more: a complete line that is otherwise is refused.
_REQUEST_LINE = re.compile(rb"[^ ]+ [\x21-\x7e]+ HTTP/1\.\d")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]+)(?:[ \t]*;.*)?", re.DOTALL)


class State(enum.Enum):
    """How far a request has come."""

    HEAD = enum.auto()  # the head is not whole yet
    BODY = enum.auto()  # the body is not
    WHOLE = enum.auto()
    REFUSED = enum.auto()  # gunicorn or the application will refuse it, whatever else comes
    TOO_LARGE = enum.auto()  # a chunked body over the limit


class Incoming:
    """One request as it arrives. Used by the loop's thread only.

    ``max_body`` is in bytes. ``buffer`` holds what has come, and after ``end`` what belongs to the
    connection's next request.
    """

    def __init__(self, cfg: Config, max_body: int):
        self.buffer = bytearray()
        self.state = State.HEAD
        self.end = 0
        self.request: Request | None = None  # the head, as soon as it is whole and valid
        self._cfg, self._max_body = cfg, max_body
        self._max_line = cfg.limit_request_line
        self._max_trailer = cfg.limit_request_fields * (cfg.limit_request_field_size + 2) + 4
        self._max_head = self._max_trailer + self._max_line + 4
        self._max_size_line = cfg.limit_request_field_size
        self._line_is_whole = False  # the request line
        self._scanned = 0  # where looking for the next mark goes on
        self._body = 0  # where the body begins
        self._chunks = 0
        self._chunked = 0  # bytes that these chunks have, or announced
        self._trailer: int | None = None  # where it begins

    @property
    def has_body(self) -> bool:
        """Whether there is more than a head to this request."""
        end = self.end if self.state is State.WHOLE else len(self.buffer)
        return 0 < self._body < end

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for 100 before it sends the body."""
        return bool(getattr(self.request, "_expected_100_continue", False))

    def feed(self, data: bytes | bytearray | memoryview) -> State:
        """Take more bytes; says how far the request has come."""
        self.buffer += data
        if self.state is State.HEAD:
            self.state = self._read_head()
        elif self.state is State.BODY:
            self.state = self._read_body()
        return self.state

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
            if not self._line_is_whole and len(buffer) - start - 2 > self._max_line:
                return State.REFUSED
        head_end = buffer.find(b"\r\n\r\n", max(start, self._scanned - 3))
        if head_end >= 0:
            return self._judge_head(head_end + 4)
        refused = len(buffer) > self._max_head or _BARE_LF.search(buffer, self._scanned)
        self._scanned = len(buffer)
        return State.REFUSED if refused else State.HEAD

    def _judge_head(self, end: int) -> State:
        try:
            request = Request(self._cfg, IterUnreader([bytes(self.buffer[:end])]), ("", 0))
        except Exception:  # whatever it is: the same parser raises it again where it is answered
            return State.REFUSED
        self.request, self._body, self._scanned = request, end, end
        reader = request.body.reader if request.body else None
        if isinstance(reader, LengthReader):  # of length 0 if there is no body; else it is chunked
            if reader.length > self._max_body:
                return State.REFUSED
            self.end = end + reader.length
        return self._read_body()

    def _read_body(self) -> State:
        if self.end:
            return State.WHOLE if len(self.buffer) >= self.end else State.BODY
        # The frame of a chunked body may not be much larger than what it can carry.
        if len(self.buffer) - self._body > 2 * self._max_body + self._max_trailer:
            return State.TOO_LARGE
        state = None
        while state is None:
            state = self._read_chunk() if self._trailer is None else self._read_trailer()
        return state

    def _read_chunk(self) -> State | None:
        """One chunk's size line, after the line end of the chunk before; None: look on."""
        buffer, start = self.buffer, self._scanned
        if len(buffer) < start + 2:
            return State.BODY
        if self._chunks:
            if not buffer.startswith(b"\r\n", start):
                return State.REFUSED
            start += 2
        line_end = buffer.find(b"\r\n", start)
        if line_end < 0:
            return State.REFUSED if len(buffer) - start > self._max_size_line else State.BODY
        line = _CHUNK_SIZE.fullmatch(buffer, start, line_end)
        if line is None:
            return State.REFUSED
        size = int(line[1], 16)
        self._chunks += 1
        self._chunked += size
        if self._chunked > self._max_body or self._chunks > _MAX_CHUNKS:
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
        if found >= 0:
            self.end = found + 4
            return State.WHOLE
        refused = len(buffer) - start > self._max_trailer or _BARE_LF.search(buffer, self._scanned)
        self._scanned = len(buffer)
        return State.REFUSED if refused else State.BODY


def _pieces(data: bytearray) -> Generator[bytes, None, None]:
    while data:
        piece = bytes(memoryview(data)[:_PIECE])
        del data[:_PIECE]
        yield piece
