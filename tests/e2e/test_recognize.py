"""The documented route's events and optional fields through a real gunicorn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.e2e.server import Server
from tests.e2e.steps_app import PIECES
from tests.waiting import until
from tests.wire import ROUTE, picture, send

EVENTS = {"Accept": "text/event-stream"}
ANSWER = "图中有一个蓝色的圆形。"


def ask(server: Server, *, events: bool = False, **fields: object) -> requests.Response:
    files = {"image": ("a.png", picture("circle", "blue"), "image/png")}
    return requests.post(
        server.url + ROUTE,
        files=files,
        data={"prompt": "这张图里有什么？", **fields},
        headers=EVENTS if events else {},
        stream=events,
        timeout=60,
    )


def data(blocks: str) -> list[dict]:
    return [json.loads(found) for found in re.findall("^data: (.*)$", blocks, re.MULTILINE)]


def test_the_same_answer_whole_and_streamed(server: Server):
    whole = ask(server)
    assert whole.json() == {"status": "success", "result": ANSWER}
    *deltas, last = data(ask(server, events=True).content.decode())
    assert "".join(piece["delta"] for piece in deltas) == ANSWER
    assert len(deltas) > 3
    assert (last["status"], last["result"]) == ("success", ANSWER)
    assert last["finish_reason"] == whole.headers["X-Finish-Reason"] == "stop"
    for name in ("prompt_tokens", "completion_tokens"):
        header = whole.headers[f"X-{name.replace('_', '-')}"]
        assert last["usage"][name] == int(header) > 0


def test_fields_reach_the_model(server: Server):
    cut = ask(server, max_new_tokens=2)
    assert cut.json()["status"] == "success"
    assert ANSWER.startswith(cut.json()["result"])
    assert (cut.headers["X-Finish-Reason"], cut.headers["X-Completion-Tokens"]) == ("length", "2")
    stopped = ask(server, stop="蓝色")
    assert (stopped.json()["result"], stopped.headers["X-Finish-Reason"]) == ("图中有一个", "stop")

    def wild(seed: int) -> str:
        result: str = ask(server, temperature=2, top_k=0, top_p=1, seed=seed).json()["result"]
        return result

    assert wild(7) == wild(7)
    assert len({wild(seed) for seed in range(8)}) > 1
    refused = ask(server, temperature=-1)
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "temperature"]


@pytest.fixture
def stepped(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "log", "tests.e2e.steps_app:app") as server:
        server.wait()
        yield server


def step(server: Server) -> None:
    assert send(server.port, "POST", "/step").status == 200


def debug(server: Server) -> dict:
    return json.loads(send(server.port, "GET", "/debug").body)


def test_pieces_arrive_as_they_are_made_and_who_leaves_frees_its_place(stepped: Server):
    """The next piece is made only after the one before it has come."""
    step(stepped)
    with ask(stepped, events=True) as response:
        chunks = response.iter_content(None)
        for number, piece in enumerate(PIECES):
            if number:
                step(stepped)
            assert next(chunks).decode() == f'data: {{"delta":"{piece}"}}\n\n'
        assert data(b"".join(chunks).decode())[-1]["result"] == "".join(PIECES)
    idle = {"taken": 0, "watched": 0}
    until(lambda: debug(stepped).items() >= idle.items(), said=lambda: debug(stepped))

    step(stepped)
    with ask(stepped, events=True) as response:
        chunks = response.iter_content(None)  # urllib3 closes the connection when it is dropped
        next(chunks)
        held = debug(stepped)
        assert (held["taken"], held["watched"], held["cancelled"][-1]) == (1, 1, 0)
    until(lambda: debug(stepped).items() >= idle.items(), said=lambda: debug(stepped))
    assert debug(stepped)["cancelled"][-1]
    last = until(lambda: re.findall(".*reason=client_gone.*", stepped.log.read_text()))
    assert len(last) == 1
    assert "status=200" in last[0]
