"""Valid uploads, mutated in a fixed random order: always an answer of ours, and soon."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

import pytest
from flask.testing import FlaskClient
from PIL import Image

from qwenvl_app.testing import ScriptedBackend, prompt_of
from tests.picture_writers import png, ramp, tiff
from tests.pictures import chunk, exif, jpeg_with, mode, packed_text, segment, small_webp
from tests.wire import BOUNDARY, END, GOOD, MULTIPART, PROMPT, ROUTE, part, picture

SIZE = (24, 16)
SLOW = 5  # seconds of this thread's work for one request of a picture as small as these
SEEDS = {
    **{
        name: picture(size=SIZE, file_format=name)
        for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF", "MPO")
    },
    "EXIF": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(6))),
    "palette": mode("P", transparency=0),
    "alpha": mode("LA"),
    "transparent 16 bits": png(
        ramp(16, 24, 3, 16), 16, 2, before=chunk(b"tRNS", bytes(6)) + packed_text("zTXt", 500)
    ),
    "WhiteIsZero": tiff(ramp(16, 24, 1, 16), 16, 0, planar=True),
    "no end": picture(size=SIZE, file_format="JPEG")[:-2],
    "canvas": small_webp(Image.new("RGB", (8, 8)), SIZE),
}
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Mutation = Callable[[random.Random, bytearray], None]


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def remove(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 40)]


def repeat(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randint(1, 100)]
    data[start:start] = piece * rng.randint(1, 20)


def number(rng: random.Random, data: bytearray) -> None:
    """What may be a length, a count or an offset gets a value at the edge."""
    layout = rng.choice((">B", ">H", "<H", ">L", "<L"))
    size = struct.calcsize(layout)
    if len(data) >= size:
        value = rng.choice(INTERESTING) & (256**size - 1)
        struct.pack_into(layout, data, rng.randrange(len(data) - size + 1), value)


def splice(rng: random.Random, data: bytearray) -> None:
    other = rng.choice(list(SEEDS.values()))
    start = rng.randrange(len(other))
    at = rng.randrange(len(data))
    data[at : at + rng.randint(0, 60)] = other[start : start + rng.randint(1, 200)]


MUTATIONS: tuple[Mutation, ...] = (flip, truncate, remove, repeat, number, splice)


def mutate(rng: random.Random, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if data:
            rng.choice(MUTATIONS)(rng, data)
    return bytes(data)


def attack(
    client: FlaskClient, backend: ScriptedBackend, body: bytes, kind: str = MULTIPART
) -> int:
    started = time.thread_time()
    response = client.post(ROUTE, data=body, content_type=kind)
    assert response.status_code in (200, 400, 413, 422), body
    assert response.headers["Content-Type"] == "application/json"
    assert time.thread_time() - started < SLOW, body
    backend.requests.clear()
    return response.status_code


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SEEDS)
def test_mutated_pictures(name: str, count: int, client: FlaskClient, backend: ScriptedBackend):
    rng = random.Random(name)
    tail = PROMPT + END
    statuses = {
        attack(client, backend, part("image", mutate(rng, SEEDS[name]), "a", "image/png") + tail)
        for _ in range(count)
    }
    assert statuses >= {200, 400}
    assert attack(client, backend, GOOD) == 200


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_forms(count: int, client: FlaskClient, backend: ScriptedBackend):
    rng = random.Random(4)
    small = part("image", SEEDS["GIF"], "a.gif", "image/gif") + PROMPT + END
    tokens = [b"\r\n", b"\r", b"\n", b"--", b"\0", b'"', b";", b":", f"--{BOUNDARY}".encode(), END]
    statuses = set()
    for _ in range(count):
        data = bytearray(mutate(rng, small) if rng.random() < 0.5 else small)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.choice((0, 0, 1, 5))] = rng.choice(tokens)
        kind = MULTIPART
        if rng.random() < 0.1:
            kind = mutate(rng, MULTIPART.encode()).decode("latin-1")
            kind = "".join(sign for sign in kind if sign.isprintable())
        statuses.add(attack(client, backend, bytes(data), kind))
    assert statuses >= {200, 400, 422}
    assert attack(client, backend, GOOD) == 200


NAUGHTY = (
    *("", " ", "\t", "\n", "\0", "\x1b[2J", "\u00a0", "\u200b", "\ufeff", "\u202e", "\ud7ff", "�"),
    *(
        "NULL",
        "null",
        "None",
        "undefined",
        "NaN",
        "-1",
        "1e309",
        "0x00",
        "true",
        "[]",
        "{}",
        "{{}}",
    ),
    *("'", '"', "''", "`", "\\", "\\\\", "%", "%s%s%s%n", "%00", "%0d%0aX: y", "${1+1}", "#{1+1}"),
    *("' OR 1=1 --", "<script>alert(1)</script>", "<!--", "]]>", "&amp;&lt;", "../../etc/passwd"),
    *("C:\\CON", "file:///etc/passwd", "| cat /etc/passwd", "$(reboot)", "; rm -rf /", "() { :; }"),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|image_pad|>" * 50,
        "<|vision_end|>",
        "<tool_call>",
        "</think>",
    ),
    *("田中さん", "社會科學院", "ﷺ", "🏳️‍🌈👩‍👩‍👧‍👦", "Ω≈ç√∫", "ÅÍÎÏ˝", "١٢٣", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞", "ﬁ", "ẞ", "İ"),
    *("a" * 5000, "字" * 5000, "\U0010ffff", "\ufffe", "\u2028\u2029", "-" * 100, "=" * 100),
)


@pytest.mark.parametrize("where", ["prompt", "file name", "type"])
def test_naughty_strings(where: str, client: FlaskClient, backend: ScriptedBackend):
    """As a prompt they arrive as they were sent."""
    assert len(NAUGHTY) >= 60
    for text in NAUGHTY:
        raw = text.encode("utf-8", "surrogatepass")
        if where == "prompt":
            body = part("image", SEEDS["PNG"], "a.png", "image/png") + part("prompt", raw) + END
            response = client.post(ROUTE, data=body, content_type=MULTIPART)
            assert response.status_code == (200 if text else 422)
            assert [prompt_of(request) for request in backend.requests] == ([text] if text else [])
            backend.requests.clear()
            continue
        names = (text, "image/png") if where == "file name" else ("a.png", text)
        names = tuple(name.encode("utf-8", "replace").decode() for name in names)
        assert attack(client, backend, part("image", SEEDS["PNG"], *names) + PROMPT + END)
