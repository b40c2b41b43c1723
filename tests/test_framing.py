"""Where a request ends, compared with what gunicorn's own parser makes of the same bytes."""

from __future__ import annotations

import random

import pytest
from gunicorn.config import Config
from gunicorn.http import RequestParser
from gunicorn.http.errors import NoMoreData, ParseException

from qwenvl_app.server.framing import Incoming, State
from tests.framing import CASES, Framing, chunked, chunks, form, get, length
from tests.wire import GOOD

LIMIT = 2**20
CONFIG = Config()


def opinion(raw: bytes) -> int | str:
    """Where gunicorn sees the first request end, or that it is incomplete, or refused."""
    pieces = iter([raw[start : start + 2**16] for start in range(0, len(raw), 2**16)])
    parser = RequestParser(CONFIG, pieces, ("127.0.0.1", 1))
    try:
        request = next(parser)
        body = request.body.read()
    except (NoMoreData, StopIteration):
        return "incomplete"
    except ParseException:
        return "refused"
    for name, value in request.headers:
        if name == "CONTENT-LENGTH" and len(body) < int(value):
            return "incomplete"
    return len(raw) - len(parser.unreader.take_buffered()) - sum(map(len, pieces))


def detect(raw: bytes, cuts: list[int]) -> Incoming:
    """Feed ``raw`` cut at ``cuts``; what comes after the end is left over."""
    incoming = Incoming(CONFIG, LIMIT)
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
            assert expected in (incoming.end, "refused")
        elif incoming.state in (State.HEAD, State.BODY):
            assert expected == "incomplete"
        elif expected != "refused":  # what is over our own limits gunicorn would read
            assert 413 in case.statuses


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
    incoming = Incoming(CONFIG, LIMIT)
    incoming.feed(chunked(b"0\r\nA: "))
    for _ in range(200_000):
        assert incoming.feed(b"b") is State.BODY


def test_a_refused_body_is_a_body():
    """It went past the bound on bodies in the pool, to the threads kept for health checks."""
    incoming = Incoming(CONFIG, LIMIT)
    sent = b"5\r\nhello\r\n" * 3
    incoming.feed(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + sent)
    assert incoming.feed(b"no size\r\n") is State.REFUSED
    assert incoming.has_body
