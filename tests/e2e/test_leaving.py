"""Clients that leave at any moment, and more of them than there is room for."""

from __future__ import annotations

import base64
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import requests

from tests.e2e.server import Server
from tests.e2e.test_streams import CHAT, memory
from tests.waiting import until
from tests.wire import END, GOOD, MULTIPART, ROUTE, exchange, part, picture, post, send

MINUTE = pytest.param(60, marks=pytest.mark.slow)
QUEUE_S = 5
BOUND_S = 10  # that a request may take in all
pytestmark = pytest.mark.timeout(300)

COLORS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        tmp_path_factory.mktemp("probed") / "log",
        "tests.e2e.probe_app:app",
        QWENVL_QUEUE_TIMEOUT_S=str(QUEUE_S),
        QWENVL_REQUEST_TIMEOUT_S=str(BOUND_S),
    ) as server:
        server.wait()
        assert post(server.port, GOOD).status == 200
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def debug(server: Server) -> dict:
    return json.loads(send(server.port, "GET", "/debug").body)


def settled(server: Server, before: dict) -> dict:
    """Wait until everything is as it was before; returns what was recorded meanwhile."""

    def same() -> dict | None:
        now = debug(server)
        alike = all(now[key] == before[key] for key in ("idle", "threads"))
        # Fewer where a connection of what came before was still closing then.
        alike = alike and now["files"] <= before["files"]
        return now if alike and not any(now["idle"].values()) else None

    return until(same, 10, lambda: str((before, debug(server))))


def request(color: str, number: str, accept: str = "*/*") -> bytes:
    body = part("image", picture("circle", color), "a.png", "image/png")
    body += part("prompt", b"what color is the shape?") + END
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: {number}\r\n"
    head += f"Accept: {accept}\r\n"
    head += f"Content-Type: {MULTIPART}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("seconds", [3, MINUTE])
def test_clients_killed_at_random_moments(probed: Server, seconds: float):
    """The engine went on for them, and nobody else had their permits meanwhile."""
    before = settled(probed, debug(probed))
    end = time.monotonic() + seconds
    left: dict[str, float] = {}
    stayed: Counter[int] = Counter()
    wrong: list[object] = []

    def leave(rng: random.Random, sent: bytes, number: str) -> None:
        with socket.create_connection(("127.0.0.1", probed.port), 10) as connection:
            if rng.random() < 0.2:
                sent = sent[: rng.randrange(len(sent))]
            connection.sendall(sent)
            time.sleep(rng.random() * rng.choice((0.01, 0.1, 1.5)))
            if rng.random() < 0.5:  # a reset
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        left[number] = time.monotonic()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for turn in range(10**6):
            if time.monotonic() > end:
                return
            number, color = f"{seed}-{turn}", rng.choice(COLORS)
            if rng.random() < 0.8:
                accept = rng.choice(("*/*", "text/event-stream"))
                leave(rng, request(color, number, accept), number)
                continue
            answer = exchange(probed.port, request(color, number))
            stayed[answer.status] += 1
            if answer.status == 200 and json.loads(answer.body)["result"] != color:
                wrong.append(answer)

    run([threading.Thread(target=client, args=(seed,)) for seed in range(10)])
    after = settled(probed, before)
    assert wrong == []
    assert set(stayed) <= {200, 503}
    assert stayed[200]
    steps = {number: at for number, at in after["last_step"].items() if number in left}
    assert len(steps) >= seconds // 8
    assert max(at - left[number] for number, at in steps.items()) < 1
    assert post(probed.port, GOOD).status == 200


@pytest.mark.parametrize("seconds", [2, MINUTE])  # 100 clients are both cores' work
def test_a_hundred_clients_at_once(probed: Server, seconds: float):
    """Each gets a right answer or a 503 that says when to come back, in time and in turn."""
    before = settled(probed, debug(probed))
    end = time.monotonic() + seconds
    lock, seen, wrong = threading.Lock(), Counter[int](), []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            color, began = rng.choice(COLORS), time.monotonic()
            answer = exchange(probed.port, request(color, "crowd"))
            body, took = json.loads(answer.body), time.monotonic() - began
            right = {
                200: body.get("result") == color,
                503: body.get("detail") == "服务器繁忙，请稍后重试。"
                and 1 <= int(answer.headers.get("retry-after", 0)) <= 60,
            }
            with lock:
                seen[answer.status] += 1
                if not right.get(answer.status) or took > BOUND_S + 1:
                    wrong.append((answer, took))
            time.sleep(0.2)

    run([threading.Thread(target=client, args=(seed,)) for seed in range(100)])
    after = settled(probed, before)
    assert wrong == []
    assert seen[200] > 20
    assert seen[503] > 20
    assert max(after["waits"]) < QUEUE_S + 1
    granted = after["granted"][len(before["granted"]) :]
    assert len(granted) > 20
    assert granted == sorted(granted)


def questions() -> list[dict]:
    """With a picture and without, short answers and long ones."""
    asked: list[dict] = []
    for number, color in enumerate(("red", "green", "blue", "black")):
        url = "data:image/png;base64," + base64.b64encode(picture("circle", color)).decode()
        text = {"type": "text", "text": "what color is the shape?"}
        seen = [{"type": "image_url", "image_url": {"url": url}}, text]
        for content in (seen, f"{color}?"):
            body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
            asked.append(body | {"max_tokens": 10 * number + 3, "ignore_eos": bool(number)})
    return asked


def whole(server: Server, body: dict) -> str:
    answer = requests.post(server.url + CHAT, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def begun(server: Server, body: dict, events: int) -> str:
    """The text of a stream's first events; its client leaves without the others."""
    text, seen = "", 0
    with requests.post(
        server.url + CHAT, json=body | {"stream": True}, stream=True, timeout=60
    ) as answer:
        assert answer.status_code == 200, answer.text
        for line in answer.iter_lines():
            if seen == events or line == b"data: [DONE]":
                break
            if line:
                seen += 1
                choice = json.loads(line[6:])["choices"][0]
                text += choice["delta"].get("content", "")
    return text


@pytest.mark.parametrize(
    ("seconds", "clients"), [(3, 6), pytest.param(60, 8, marks=pytest.mark.slow)]
)
def test_streams_and_plain_requests_at_once(probed: Server, seconds: float, clients: int):
    """As many clients of each kind; every third stream is stopped half-way."""
    asked = questions()
    right = [whole(probed, body) for body in asked]  # each by itself
    assert len(set(right)) > 3
    before, kept = settled(probed, debug(probed)), memory(probed)
    end, counts = time.monotonic() + seconds, Counter[str]()
    lock, wrong = threading.Lock(), []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            body, text = rng.choice(list(zip(asked, right, strict=True)))
            kind = "plain" if seed < clients // 2 else rng.choice(("stream", "stream", "stopped"))
            if kind == "plain":
                answer = whole(probed, body)
            else:
                answer = begun(probed, body, rng.randint(1, 8) if kind == "stopped" else -1)
            same = text.startswith(answer) if kind == "stopped" else text == answer
            with lock:
                counts[kind] += 1
                if not same:
                    wrong.append((kind, text, answer))

    run([threading.Thread(target=client, args=(seed,)) for seed in range(clients)])
    settled(probed, before)
    assert wrong == []
    assert min(counts[kind] for kind in ("plain", "stream", "stopped")) >= seconds / 5
    assert memory(probed) - kept < 100
