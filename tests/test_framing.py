"""Where a request ends, compared with what gunicorn's own parser makes of the same bytes."""

from __future__ import annotations

import random

import pytest
from gunicorn.config import Config
from gunicorn.http import RequestParser
from gunicorn.http.errors import ChunkMissingTerminator, NoMoreData, ParseException

from qwenvl_app.server.framing import FramingLimits, Incoming, State
from tests.framing import CASES, CHUNKED, Framing, chunked, chunks, form, get, length
from tests.wire import GOOD

LIMIT = 2**20
CONFIG = Config()
LIMITS = FramingLimits(CONFIG, LIMIT)


def opinion(raw: bytes) -> int | str:
    """Where gunicorn sees the first request end, or that it is incomplete, or refused."""
    pieces = iter([raw[start : start + 2**16] for start in range(0, len(raw), 2**16)])
    parser = RequestParser(CONFIG, pieces, ("127.0.0.1", 1))
    try:
        request = next(parser)
        body = request.body.read()
    except (NoMoreData, StopIteration):
        return "incomplete"
    except ChunkMissingTerminator as fault:
        return "refused" if len(fault.term) == 2 else "incomplete"  # it met the end of all bytes
    except ParseException:
        return "refused"
    for name, value in request.headers:
        if name == "CONTENT-LENGTH" and len(body) < int(value):
            return "incomplete"
    return len(raw) - len(parser.unreader.take_buffered()) - sum(map(len, pieces))


def detect(raw: bytes, cuts: list[int]) -> Incoming:
    """Feed ``raw`` cut at ``cuts``; what comes after the end is left over."""
    incoming = Incoming(LIMITS)
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        if incoming.feed(raw[start:end]) not in (State.HEAD, State.BODY):
            break
    return incoming


def splits(raw: bytes) -> list[list[int]]:
    chance = random.Random(raw)
    count = min(len(raw), 2000)
    few = [sorted(chance.sample(range(len(raw)), min(count, n))) for n in (0, 1, 2, 5, 20)]
    return [*few, sorted(chance.sample(range(len(raw)), count))]


VALID = [
    Framing("two", form(length(len(GOOD))) + get(), ()),
    Framing("two chunked", chunked(chunks(GOOD)) * 2, ()),
    Framing("upper case", chunked(b"A;x\r\n0123456789\r\n00\r\n\r\n"), ()),
    Framing("trailers", chunked(chunks(b"a", end=b"0\r\nA: b\r\nC: d\r\n\r\nGET")), ()),
]


@pytest.mark.parametrize("case", [*CASES, *VALID], ids=lambda case: case.name)
def test_it_sees_what_gunicorn_sees(case: Framing):
    """However the bytes are cut: the same end, the same refusals, and no waiting for more."""
    expected = opinion(case.raw)
    for cuts in splits(case.raw) if case.raw else []:
        incoming = detect(case.raw, cuts)
        if incoming.state is State.WHOLE:
            assert incoming.end == expected
        elif incoming.state in (State.HEAD, State.BODY):
            assert expected == "incomplete"
        elif expected != "refused":  # what is over our own limits gunicorn would read
            assert 413 in case.statuses


# What a chunked body's frame may be made of, good and bad, to be put together at random.
SIZES = [b"5", b"05", b"0" * 40 + b"5", b"5 ", b" 5", b"+5", b"5_0", b"0x5", b"5\x00", b"5\r", b""]
EXTENSIONS = [b"", b";a", b" ;a=b", b"\t; a = b", b';a="b c"', b';a="b\\"c"', b";a;b;c=d"]
EXTENSIONS += [
    b";",
    b";a\nb",
    b";a\rb",
    b';a="b',
    b';a="\r\n"',
    b";a b",
    b";a=",
    b";\x00",
    b";\xff",
]
LINE_ENDS = [b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b"\n\r\n"]
TRAILERS = [b"", b"A: b\r\n", b"A: b\r\nC:\t d \r\n", b"A:\r\n", b"A: b\n", b"A: b\rC: d\r\n"]
TRAILERS += [b"A: \x00\r\n", b"A : b\r\n", b" A: b\r\n", b"A: b\r\n c\r\n", b": b\r\n", b"A\r\n"]
TRAILERS += [
    b"Content-Length: 3\r\n",
    b"transfer-encoding: chunked\r\n",
    b"Host: y\r\n",
    b"TE: x\r\n",
]
TRAILERS += [b"Content-Type: a\r\n" * 2, b"A_B: c\r\n", b"\xc4: b\r\n", b"A: b\r\n" * 101]
TRAILERS += [b"A: " + b"b" * 9000 + b"\r\n", b"Trailer: A\r\n", b"Authorization: Bearer x\r\n"]


def test_frames_put_together_at_random():
    """gunicorn judges what is read; what nobody reads it never sees, and the next request comes."""
    chance = random.Random(5)
    seen = {"refused": 0, "whole": 0, "incomplete": 0}
    for _ in range(3000):
        pieces = []
        for size in (*[chance.choice(SIZES)] * chance.randrange(2), b"0"):
            extension = chance.choice(EXTENSIONS) if chance.random() < 0.5 else b""
            pieces.append(size + extension + chance.choice(LINE_ENDS))
            if size != b"0":
                pieces.append(b"hello" + chance.choice(LINE_ENDS))
        pieces += [chance.choice(TRAILERS), chance.choice(LINE_ENDS)]
        raw = chunked(b"".join(pieces)) + get() * chance.randrange(2)
        expected = opinion(raw)
        count = min(20, len(raw))
        for cuts in ([], sorted(chance.sample(range(len(raw)), count))):
            incoming = detect(raw, cuts)
            if incoming.state is State.WHOLE:
                assert incoming.end == expected, raw
            else:
                said = "incomplete" if incoming.state is State.BODY else "refused"
                assert said == expected, raw
        seen["whole" if isinstance(expected, int) else expected] += 1
    assert min(seen.values()) > 50, seen


@pytest.mark.parametrize("line", [b"5;" + b"a" * 9000 + b"\r\n", b"0" * 9000 + b"5\r\n"])
def test_a_long_line_is_refused_however_it_is_cut(line: bytes):
    """gunicorn finds its end, or that it is too long, by how the network cut it."""
    raw = chunked(line + b"hello\r\n0\r\n\r\n")
    assert all(detect(raw, cuts).state is State.MALFORMED for cuts in splits(raw))


def test_a_request_is_taken_and_the_next_one_stays():
    incoming = detect(form(length(len(GOOD))) + b"GET", [])
    pieces, rest = incoming.take()
    assert b"".join(pieces) == form(length(len(GOOD)))
    assert rest == b"GET"
    assert incoming.has_body
    assert not detect(get(), []).has_body


def test_large_bodies_come_in_pieces():
    raw = form(length(LIMIT), body=bytes(LIMIT))
    incoming = detect(raw, [100, 5000, 900_000])
    assert incoming.state is State.WHOLE
    sizes = [len(piece) for piece in incoming.take()[0]]
    assert sum(sizes) == len(raw)
    assert max(sizes) <= 2**16


@pytest.mark.parametrize(("value", "expected"), [(b"100-continue", True), (b"", False)])
def test_a_client_that_waits_for_100_is_seen(value: bytes, expected: bool):
    header = b"Expect: " + value if value else b"A: b"
    assert detect(form(header, length(5), body=b""), []).expects_continue is expected


def test_a_body_of_many_bytes_is_scanned_once():
    """A trickled chunk-size line or trailer must not be searched from its start every time."""

    class Counting(bytearray):
        searched = 0

        def find(self, mark, start=0):
            self.searched += len(self) - start
            return super().find(mark, start)

    incoming = Incoming(LIMITS)
    incoming.buffer = buffer = Counting()
    incoming.feed(chunked(b"0\r\nA: "))
    for _ in range(20_000):
        assert incoming.feed(b"b") is State.BODY
    assert 20_000 < buffer.searched < 10 * 20_000


def test_what_is_refused_has_no_body():
    """It went past the bound on bodies in the pool, to the threads kept for health checks."""
    incoming = Incoming(LIMITS)
    incoming.feed(chunked(b"5\r\nhello\r\n" * 3))
    assert incoming.feed(b"no size\r\n") is State.MALFORMED
    assert not incoming.has_body
    refused = detect(form(length(LIMIT + 1), body=bytes(1000)), [])
    assert refused.state is State.REFUSED
    assert not refused.has_body


@pytest.mark.parametrize("framed", [form(length(len(GOOD))), chunked(chunks(GOOD))])
def test_a_body_that_is_not_wanted_is_not_waited_for(framed: bytes):
    """Nor kept: the application gets the head. If all of it is here there is nothing to save."""
    asked = []
    limits = FramingLimits(CONFIG, LIMIT, lambda request: asked.append(request.path))
    head_end = framed.index(b"\r\n\r\n") + 4
    for come in (head_end, head_end + 1, len(framed) - 1):
        incoming = Incoming(limits)
        assert incoming.feed(framed[:come]) is State.REFUSED
        assert b"".join(incoming.take()[0]) == framed[:head_end]
    assert Incoming(limits).feed(framed) is State.WHOLE
    assert Incoming(limits).feed(get()) is State.WHOLE
    assert len(asked) == 3


@pytest.mark.parametrize("setting", ["limit_request_fields", "limit_request_field_size"])
def test_limits_are_what_gunicorn_makes_of_them(setting: str):
    """0 is its largest, or its default; here it was a head of 4 bytes."""
    config = Config()
    config.set(setting, 0)
    incoming = Incoming(FramingLimits(config, LIMIT))
    assert incoming.feed(get(*[b"A: " + b"b" * 1000] * 20)[:-4]) is State.HEAD


def test_whom_gunicorn_trusts_is_who_has_connected():
    """By default 127.0.0.1 may send names that it takes no others from."""
    config = Config()
    config.set("header_map", "refuse")
    for peer, state in ((("127.0.0.1", 1), State.BODY), (("10.0.0.1", 1), State.REFUSED)):
        incoming = Incoming(FramingLimits(config, LIMIT), peer)
        assert incoming.feed(form(b"Path_Info: x", CHUNKED, body=b"")) is state


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"GET /v1/models HTTP/1.1", "/v1/models"),
        (b"\r\nGET /v1/models?a=b HTTP/1.1\r\n", "/v1/models"),
        (b"GET /v1%2Fmodels HTTP/1.1", "/v1/models"),
        (b"GET http://x/v1/models HTTP/1.1", "/v1/models"),
        (b"GET /v1/models", ""),
        (b"GET http://x", ""),
        (b"/v1/models \r\n", ""),
        (b"GET\r\n /v1/models \r\n", ""),
        (b"GET /\xff HTTP/1.1", "/\xff"),
        (b"", ""),
    ],
)
def test_the_path_is_told_by_the_first_bytes(raw: bytes, path: str):
    incoming = Incoming(LIMITS)
    incoming.feed(raw)
    assert incoming.asked.path == path
