"""The largest hostile bodies of the chat route, over a socket, and the memory that they take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.server import FAKE, Server
from tests.e2e.test_memory import memory
from tests.wire import post, send

SIZE = 20 * 2**20 - 2**10  # bytes: nearly what an upload may have
AT_ONCE = 12
# In MiB: what one body needs while it is read. Four bytes a character, twice, and the body itself.
READING = 250
URL = b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"'
TEXT = b'{"messages":[{"role":"user","content":"'
FORMAT = (
    b'{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema",'
    b'"json_schema":{"name":"x","schema":{"title":"'
)
SMILE = "😀".encode()  # a text with one takes four bytes a character


def fill(head: bytes, unit: bytes, tail: bytes) -> bytes:
    return head + unit * ((SIZE - len(head) - len(tail)) // len(unit)) + tail


def parts(part: object) -> bytes:
    message = {"role": "user", "content": [part] * 1000}
    return json.dumps({"messages": [message] * 198}).encode()


# Made when asked for: together they are 400 MB.
BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "base64 that is cut": (lambda: fill(URL + b"data:image/png;base64,", b"A", b'!"}}]}]}'), 400),
    "base64 of zeros": (lambda: fill(URL + b"data:image/png;base64,", b"AAAA", b'"}}]}]}'), 400),
    "no base64": (lambda: fill(URL + b"data:image/png;base64," + SMILE, b"AAAA", b'"}}]}]}'), 400),
    "an address": (lambda: fill(URL + b"https://", b"a", b'"}}]}]}'), 400),
    "a text": (lambda: fill(TEXT, b"x", b'"}]}'), 413),
    "a text with a smile": (lambda: fill(TEXT + SMILE, b"x", b'"}]}'), 413),
    "a text of escapes": (lambda: fill(TEXT, rb"\ud83d\ude00", b'"}]}'), 413),
    "surrogates": (lambda: fill(TEXT, rb"\ud83d", b'"}]}'), 400),
    "a schema with a smile": (lambda: fill(FORMAT + SMILE, b"x", b'"}}}}'), 400),
    "a label with a smile": (lambda: fill(b'{"messages":[],"user":"' + SMILE, b"x", b'"}'), 400),
    "a key": (lambda: fill(b'{"', b"x", b'":1}'), 400),
    "a key twice": (lambda: fill(b'{"user":"', b"x", b'","user":1}'), 400),
    "brackets": (lambda: fill(b'{"messages":', b"[", b"}"), 400),
    "objects in objects": (lambda: fill(b'{"a":', b'{"a":', b"1}"), 400),
    "spaces": (lambda: fill(b'{"messages":', b" ", b"1}"), 400),
    "digits": (lambda: fill(b'{"seed":', b"9", b"}"), 400),
    "NaN": (lambda: fill(b'{"messages":[', b"NaN,", b"1]}"), 400),
    "198,000 parts of no kind": (lambda: parts({"type": "x"}), 400),
    "198,000 parts without a text": (lambda: parts({"type": "text"}), 400),
    "199,000 empty lists": (lambda: b'{"messages":[' + b"[]," * 199_000 + b"[]]}", 400),
    "199,000 stops": (lambda: b'{"messages":[],"stop":[' + b"1," * 199_000 + b"1]}", 400),
    "199,000 fields": (
        lambda: json.dumps(dict.fromkeys(map(str, range(199_000)), 1)).encode(),
        400,
    ),
}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the default limits, and no model, whose memory would be beside the point."""
    with Server(tmp_path_factory.mktemp("roomy") / "log", FAKE) as server:
        server.wait()
        yield server


def check(server: Server, name: str) -> None:
    body, status = BODIES[name]
    answer = post(server.port, body(), "application/json", "/v1/chat/completions")
    assert answer.status == status
    assert len(answer.body) < 1000
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_one_is_refused_and_twelve_take_no_more_than_they_are(roomy: Server, name: str):
    """A part's errors took 2 KB, so that 2.8 MB became 400, and twelve of them a minute."""
    worker = roomy.worker
    check(roomy, name)
    idle = memory(worker, "VmRSS")
    Path(f"/proc/{worker}/clear_refs").write_text("5")  # forget the most it had
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(check, [roomy] * AT_ONCE, [name] * AT_ONCE)) == [None] * AT_ONCE
    most = AT_ONCE * len(BODIES[name][0]()) // 2**20 + READING
    assert memory(worker, "VmHWM") - idle < most
    assert roomy.worker == worker
    assert send(roomy.port, "GET", "/livez").status == 200
