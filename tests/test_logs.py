"""Log lines: one a request, in two formats; nothing private, nothing that a client steers."""

from __future__ import annotations

import json
import logging
import logging.config
import re
import sys
from collections.abc import Iterator

import pytest

from qwenvl_app import create_app, logs
from qwenvl_app.errors import Unavailable
from qwenvl_app.settings import load_settings
from qwenvl_app.testing import ScriptedBackend
from tests.wire import END, GOOD, IMAGE, MULTIPART, ROUTE, part

FORMATS = ["text", "json"]


@pytest.fixture(params=FORMATS)
def lines(request) -> Iterator[list[dict[str, object]] | list[str]]:
    """What was logged in the format of the test's parameter, as it would be printed."""
    formatter = logs.config(request.param)["formatters"]["line"]["()"]()
    printed: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            printed.append(formatter.format(record))

    handler = Handler()
    logger = logging.getLogger("qwenvl_app")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield printed
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def fields(line: str) -> dict[str, object]:
    """A line's fields, whatever its format; numbers as text."""
    if line.startswith("{"):
        return {name: str(value) for name, value in json.loads(line).items()}
    found = {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    }
    ident = re.match(r"\S+ \S+ \w+ \[(.+?)\] ", line)
    assert ident
    return found | {"request_id": ident[1]}


def test_one_line_for_a_request_with_what_was_measured(lines, client):
    client.post(ROUTE, data=GOOD, content_type=MULTIPART, headers={"X-Request-ID": "my-id"})
    (line,) = lines
    found = fields(line)
    expected = {
        "method": "POST",
        "route": ROUTE,
        "status": "200",
        "client": "127.0.0.1",
        "bytes_in": str(len(GOOD)),
        "pixels": "4096",
        "prompt_tokens": "10",
        "tokens": "3",
        "finish_reason": "stop",
        "request_id": "my-id",
    }
    assert expected.items() <= found.items()
    assert {"total_s", "read_s", "queue_s", "image_s"} <= found.keys()


def test_a_refusal_says_why(lines, client, backend: ScriptedBackend):
    backend.refusal = Unavailable.exhausted()
    client.post(ROUTE, data=GOOD, content_type=MULTIPART)
    client.get("/nope?secret=1")
    refused, unknown = map(fields, lines)
    assert (refused["status"], refused["reason"]) == ("503", "memory")
    assert (unknown["route"], unknown["path"], unknown["status"]) == ("unmatched", "/nope", "404")
    assert "secret" not in lines[1]


def test_nothing_private(lines, client):
    body = IMAGE.replace(b"a.png", b"private-name.png") + part("prompt", b"private words") + END
    client.post(ROUTE, data=body, content_type=MULTIPART)
    assert len(lines) == 1
    assert "private" not in lines[0]


NASTY = [
    "/a\r\n2026-01-01 00:00:00 INFO forged",
    "/\x1b]0;title\x07\x1b[2J",
    '/ status=200 "quoted" \\',
    "/\u202egnp.exe\u2028",
    "/\udcff\x85\x00",
]


@pytest.mark.parametrize("path", NASTY)
def test_a_client_cannot_forge_a_line_or_steer_a_terminal(lines, client, path: str):
    client.get(path.encode("utf-8", "surrogateescape").decode("latin-1"))
    (line,) = lines
    assert line.isprintable()
    assert fields(line)["status"] in ("404", "308")


def test_every_line_of_a_request_has_its_id_and_others_have_not(lines, client, backend):
    """The id was in some messages only; grep for it showed half of what a request did."""
    backend.failure = RuntimeError("x\x1b[31m")
    client.post(ROUTE, data=GOOD, content_type=MULTIPART, headers={"X-Request-ID": "abc"})
    logging.getLogger("qwenvl_app.x").warning("outside of any request")
    assert [fields(line)["request_id"] for line in lines] == ["abc", "abc", "-"]
    assert "RuntimeError" in lines[0]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("hops", "forwarded", "expected"),
    [
        (0, "1.2.3.4", "127.0.0.1"),  # nobody is believed unless it is said
        (1, "6.6.6.6, 1.2.3.4", "1.2.3.4"),  # what the client itself wrote comes first
        (2, "6.6.6.6, 1.2.3.4, 10.0.0.1", "1.2.3.4"),
        (2, "1.2.3.4", "127.0.0.1"),  # fewer than were promised: not by way of our proxies
        (1, None, "127.0.0.1"),
    ],
)
def test_the_client_address_behind_proxies(lines, hops, forwarded, expected):
    settings = load_settings({}, trusted_hops=hops)
    client = create_app(settings, ScriptedBackend()).test_client()
    client.get("/livez", headers={"X-Forwarded-For": forwarded} if forwarded else {})
    assert fields(lines[0])["client"] == expected


@pytest.mark.parametrize("log_format", FORMATS)
def test_the_configuration_is_one(log_format: str, capfd):
    """What config/gunicorn.conf.py hands over works, exceptions included."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        logging.config.dictConfig(logs.config(log_format))
        try:
            raise ValueError("bad\r\x1b")
        except ValueError:
            logging.getLogger("gunicorn.error").exception("it failed")
        sys.stderr.flush()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    printed = capfd.readouterr().err
    assert "it failed" in printed
    assert "\r" not in printed
    assert "\x1b" not in printed
    if log_format == "json":
        assert "ValueError: bad" in json.loads(printed)["exception"]
