"""Requests as bytes, good and bad, and the answer that each must get.

``SMALL_LIMITS`` are the settings under which the answers hold: they keep the cases small and quick.
"""

from __future__ import annotations

import gzip
from typing import NamedTuple

from tests.wire import GOOD, MULTIPART, ROUTE

SMALL_LIMITS = {
    "QWENVL_MAX_UPLOAD_MB": "1",
    "QWENVL_HEADER_TIMEOUT_S": "1",
    "QWENVL_BODY_TIMEOUT_S": "1",
}
MALFORMED = "请求不符合 HTTP 协议，无法解析。"
LATE = "请求没有在规定的时间内发送完毕。"
LARGE = "上传的内容超过 1 MB 的限制。"
CODING = "不支持请求的传输编码。"
VERSION = "不支持请求的 HTTP 版本。"
HEADERS = "请求的首部过多或过长。"


class Framing(NamedTuple):
    name: str
    raw: bytes
    statuses: tuple[int, ...]  # of all answers; none: the connection is closed without one
    detail: str | None = None  # of the last answer; None: not an error, or said elsewhere
    hang_up: bool = False  # the client ends its side after the last byte


def get(*headers: bytes, line: bytes = b"GET /livez HTTP/1.1", host: bytes = b"Host: x") -> bytes:
    return b"\r\n".join([line, *([host] if host else []), *headers, b"", b""])


def form(*headers: bytes, body: bytes = GOOD, version: bytes = b"1.1") -> bytes:
    """A POST of ``body``; its length has to be among ``headers``."""
    line = b"POST " + ROUTE.encode() + b" HTTP/" + version
    return get(b"Content-Type: " + MULTIPART.encode(), *headers, line=line) + body


def length(number: int | str) -> bytes:
    return f"Content-Length: {number}".encode()


def chunks(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


SIZE = length(len(GOOD))
CHUNKED = b"Transfer-Encoding: chunked"
HEAD = b"HEAD /livez HTTP/1.1"
ROW = b"Content-Length: 3\r\n\r\n"
PACKED = gzip.compress(GOOD)
MEGABYTE = bytes(2**20)
TRAILERS = b"0\r\n" + b"A: b\r\n" * 101 + b"\r\n"


def chunked(body: bytes) -> bytes:
    return form(CHUNKED, body=body)


def unread(body: bytes, framing: bytes = CHUNKED) -> bytes:
    """A POST to a path that nobody serves."""
    return get(framing, line=b"POST /nope HTTP/1.1") + body


CASES = [
    Framing("a form", form(SIZE), (200,)),
    # Lengths.
    Framing("length and coding", form(SIZE, CHUNKED), (400,), MALFORMED),
    Framing("length twice", form(SIZE, SIZE), (400,), MALFORMED),
    Framing("two lengths", form(SIZE, length(7)), (400,), MALFORMED),
    Framing("length ten too small", form(length(len(GOOD) - 10)), (422, 400), MALFORMED),
    Framing("length ten too large", form(length(len(GOOD) + 10)), (408,), LATE),
    Framing("length ten too large, hung up", form(length(len(GOOD) + 10)), (400,), MALFORMED, True),
    Framing("no length", form(), (422, 400), MALFORMED),
    Framing("length -1", form(length(-1)), (400,), MALFORMED),
    Framing("length +1", form(length("+1")), (400,), MALFORMED),
    Framing("length in hex", form(length("0x1")), (400,), MALFORMED),
    Framing("length list", form(length("5, 5")), (400,), MALFORMED),
    Framing("length empty", form(length("")), (400,), MALFORMED),
    Framing("length superscript", form(b"Content-Length: \xb2"), (400,), MALFORMED),
    Framing("length over the limit", form(length(2**20 + 1), body=b""), (413,), LARGE),
    Framing("length of thirty digits", form(length(10**30), body=b"x"), (413,), LARGE),
    Framing("length of 5,000 digits", form(length("9" * 5000)), (400,), MALFORMED),
    # Codings.
    Framing("chunked", chunked(chunks(GOOD[:100], GOOD[100:])), (200,)),
    Framing("a byte a chunk", chunked(chunks(*(bytes([byte]) for byte in GOOD))), (200,)),
    Framing("chunk extension", chunked(b"1;a=b\r\n-\r\n" + chunks(GOOD[1:])), (200,)),
    Framing("trailer", chunked(chunks(GOOD, end=b"0\r\nX-Sum: 1\r\n\r\n")), (200,)),
    Framing("forbidden trailer", chunked(chunks(GOOD, end=b"0\r\n" + ROW)), (400,), MALFORMED),
    Framing("chunked in HTTP/1.0", form(CHUNKED, version=b"1.0"), (400,), MALFORMED),
    Framing("unknown coding", form(b"Transfer-Encoding: foo"), (501,), CODING),
    Framing("unknown coding, chunked", form(b"Transfer-Encoding: foo, chunked"), (501,), CODING),
    Framing("gzip only", form(b"Transfer-Encoding: gzip"), (400,), MALFORMED),
    Framing("identity", form(b"Transfer-Encoding: identity", SIZE), (400,), MALFORMED),
    Framing("chunked twice", form(CHUNKED, CHUNKED), (400,), MALFORMED),
    Framing("chunked, gzip", form(b"Transfer-Encoding: chunked, gzip"), (400,), MALFORMED),
    Framing("a tab in the coding", form(b"Transfer-Encoding: \x0bchunked"), (400,), MALFORMED),
    Framing("a chunk of 1 GB", chunked(b"40000000\r\n" + GOOD), (413,), LARGE),
    Framing("chunks over the limit", chunked(chunks(MEGABYTE, b"x")), (413,), LARGE),
    Framing("70,000 chunks", chunked(chunks(*([b"x"] * 70_000))), (413,), LARGE),
    Framing("chunk size zz", chunked(b"zz\r\n" + GOOD), (400,), MALFORMED),
    Framing("chunk size -1", chunked(b"-1\r\n" + GOOD), (400,), MALFORMED),
    Framing("chunk size 0x10", chunked(b"0x10\r\n" + GOOD), (400,), MALFORMED),
    Framing("chunk size empty", chunked(b"\r\n" + GOOD), (400,), MALFORMED),
    Framing("second chunk size bad", chunked(chunks(GOOD, end=b"g\r\n\r\n")), (400,), MALFORMED),
    Framing("chunk size and a space", chunked(b"5 \r\nhello\r\n"), (400,), MALFORMED),
    Framing("chunk size without end", chunked(b"1" * 9000), (400,), MALFORMED),
    Framing("chunk without line end", chunked(b"5\r\nhelloX0\r\n\r\n"), (400,), MALFORMED),
    Framing("LF in a chunk size", chunked(b"5\nhello\r\n0\r\n\r\n"), (400,), MALFORMED),
    Framing("bad extension", chunked(b"5;a=\x01\r\nhello\r\n0\r\n\r\n"), (400,), MALFORMED),
    # Nobody reads these bodies; what comes behind them must not be taken for a request.
    *(
        Framing(f"unread: {name}", unread(body) + get(), (400,), MALFORMED)
        for name, body in {
            "LF in an extension": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
            "CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
            "line end in quotes": b'5;a="\r\nhello\r\n0\r\n\r\n"\r\nhello\r\n0\r\n\r\n',
            "underscore in a size": b"5_0\r\nhello\r\n0\r\n\r\n",
            "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
            "chunk too long": b"4\r\nhello\r\n0\r\n\r\n",
            "LF behind a chunk": b"5\r\nhello\n0\r\n\r\n",
            "length in the trailer": b"0\r\n" + ROW,
            "coding in the trailer": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
            "NUL in the trailer": b"0\r\nA: \0\r\n\r\n",
            "a space in a trailer's name": b"0\r\nA : b\r\n\r\n",
            "LF in the trailer": b"0\r\nA: b\nC: d\r\n\r\n",
        }.items()
    ),
    Framing("unread: a huge size", unread(b"f" * 8000 + b"\r\n") + get(), (413,), LARGE),
    Framing("unread: many trailers", unread(TRAILERS) + get(), (431,), HEADERS),
    Framing("unread and valid", unread(b"05;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n"), (404,)),
    Framing("unread, and another", unread(chunks(b"hello")) + get(), (404, 200)),
    Framing("unread with a length", unread(b"hello", length(5)) + get(), (404, 200)),
    Framing("chunks without end", chunked(chunks(GOOD, end=b"")), (408,), LATE),
    Framing("chunks cut off", chunked(chunks(GOOD, end=b"")), (400,), MALFORMED, True),
    Framing("a packed body", form(length(len(PACKED)), body=PACKED), (400,)),
    # Expectations.
    Framing("100-continue, not waited for", form(SIZE, b"Expect: 100-Continue"), (200,)),
    Framing("another expectation", form(SIZE, b"Expect: tea"), (417,)),
    # Hosts.
    Framing("two hosts", get(b"Host: y"), (400,), MALFORMED),
    Framing("no host", get(host=b""), (400,), MALFORMED),
    Framing("no host in HTTP/1.0", get(line=b"GET /livez HTTP/1.0", host=b""), (200,)),
    # Request lines.
    Framing("HTTP/0.9", b"GET /livez\r\n", (400,), MALFORMED),
    Framing("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,), MALFORMED),
    Framing("HTTP/2.0", get(line=b"GET /livez HTTP/2.0"), (505,), VERSION),
    Framing("HTTP/1.2", get(line=b"GET /livez HTTP/1.2"), (200,)),
    Framing("HTTP/1.10", get(line=b"GET /livez HTTP/1.10"), (400,), MALFORMED),
    Framing("http/1.1", get(line=b"GET /livez http/1.1"), (400,), MALFORMED),
    Framing("no version", get(line=b"GET /livez"), (400,), MALFORMED),
    Framing("a line of 5,000", get(line=b"GET /%s HTTP/1.1" % (b"a" * 5000)), (414,)),
    Framing("a line without end", b"GET /" + b"a" * 10_000, (414,)),
    Framing("an empty line before", b"\r\n" + get(), (200,)),
    Framing("two empty lines before", b"\r\n\r\n" + get(), (400,), MALFORMED),
    Framing("a space before", b" " + get(), (400,), MALFORMED),
    Framing("a space in the path", get(line=b"GET /a b HTTP/1.1"), (400,), MALFORMED),
    Framing("NUL in the path", get(line=b"GET /\0 HTTP/1.1"), (400,), MALFORMED),
    Framing("%00 in the path", get(line=b"GET /%00 HTTP/1.1"), (404,), "Not Found"),
    Framing("line ends in the path", get(line=b"GET /%0d%0aX HTTP/1.1"), (404,), "Not Found"),
    Framing("UTF-8 in the path", get(line="GET /图 HTTP/1.1".encode()), (400,), MALFORMED),
    Framing("a whole URL", get(line=b"GET http://x/livez HTTP/1.1"), (200,)),
    Framing("a host as the path", get(line=b"GET x:80 HTTP/1.1"), (400,), MALFORMED),
    Framing("a bad URL", get(line=b"GET http://[/ HTTP/1.1"), (400,), MALFORMED),
    Framing("method get", get(line=b"get /livez HTTP/1.1"), (400,), MALFORMED),
    Framing("method of 30", get(line=b"A" * 30 + b" /livez HTTP/1.1"), (400,), MALFORMED),
    Framing("HEAD", get(b"Connection: close", line=HEAD), (200,)),
    Framing("HEAD, and a bad header", get(b"A : b", line=HEAD), (400,)),
    Framing("HEAD behind an empty line", b"\r\n" + get(b"A : b", line=HEAD), (400,)),
    Framing("HEAD without host", get(line=HEAD, host=b""), (400,)),
    Framing("HEAD, half a head", get(line=HEAD)[:-2], (408,)),
    Framing("HEAD, hung up", get(line=HEAD)[:-2], (400,), None, True),
    Framing("HEAD with a bad chunk", get(CHUNKED, line=HEAD) + b"zz\r\n", (400,)),
    Framing("HEAD with a chunk of 1 GB", get(CHUNKED, line=HEAD) + b"40000000\r\n", (413,)),
    Framing("TRACE", get(line=b"TRACE /livez HTTP/1.1"), (405,), "Method Not Allowed"),
    Framing("CONNECT", get(line=b"CONNECT x:80 HTTP/1.1"), (404,), "Not Found"),
    # Headers.
    Framing("100 headers", get(*[b"A: b"] * 99), (200,)),
    Framing("101 headers", get(*[b"A: b"] * 100), (431,), HEADERS),
    Framing("a header of 9,000", get(b"A: " + b"b" * 9000), (431,), HEADERS),
    Framing("a head of 1 MB", get(*[b"A: " + b"b" * 1000] * 1000)[:-4], (431,), HEADERS),
    Framing("bare LF", get().replace(b"\r\n", b"\n"), (400,), MALFORMED),
    Framing("bare LF in the headers", get(b"A: b\nC: d"), (400,), MALFORMED),
    Framing("bare CR in a header", get(b"A: b\rC: d"), (400,), MALFORMED),
    Framing("a folded header", get(b"A: b", b" c"), (400,), MALFORMED),
    Framing("a header without colon", get(b"nonsense"), (400,), MALFORMED),
    Framing("a header without name", get(b": b"), (400,), MALFORMED),
    Framing("a space in a name", get(b"A : b"), (400,), MALFORMED),
    Framing("NUL in a header", get(b"A: \0"), (400,), MALFORMED),
    Framing("ESC in a header", get(b"A: \x1b[2J"), (400,), MALFORMED),
    Framing("Latin-1 in a header", get(b"A: \xff"), (200,)),
    Framing("UTF-8 in a name", get("图: b".encode()), (400,), MALFORMED),
    Framing("an underscore in a name", get(b"A_B: c"), (200,)),
    # Connections.
    Framing("three at once", form(SIZE) * 2 + get(), (200, 200, 200)),
    Framing("half a head", get()[:-2], (408,), LATE),
    Framing("half a head, hung up", get()[:-2], (400,), MALFORMED, True),
    Framing("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (408,), LATE),
    Framing("nothing", b"", ()),
    Framing("nothing, hung up", b"", (), None, True),
]
