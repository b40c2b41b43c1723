"""Every row of ``tests/bad_inputs.py`` against a gunicorn, and what is left of it afterwards."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.bad_inputs import INPUTS, Input
from tests.e2e.server import Server
from tests.waiting import until
from tests.wire import GOOD, post, send


class Worker:
    """What /proc knows about the worker."""

    def __init__(self, server: Server):
        self.pid = server.worker
        self.process = Path(f"/proc/{self.pid}")

    @property
    def files(self) -> int:
        return len(list((self.process / "fd").iterdir()))

    @property
    def threads(self) -> int:
        return len(list((self.process / "task").iterdir()))

    @property
    def megabytes(self) -> float:
        pages = int((self.process / "statm").read_text().split()[1])
        return pages * 4096 / 2**20


def wrong(server: Server, row: Input) -> str | None:
    """What is wrong with the answer, if anything."""
    try:
        answer = post(server.port, row.make(), row.content_type)
    except OSError as error:
        return f"{row.name}: no answer: {error}"
    body = json.loads(answer.body)
    if answer.status != row.status:
        return f"{row.name}: {answer.status} instead of {row.status}: {body}"
    if answer.status == 200:
        return None if body["status"] == "success" else f"{row.name}: {body}"
    if row.detail is not None and body != {"detail": row.detail}:
        return f"{row.name}: {body} instead of {row.detail}"
    return None


def everything(server: Server, every: int = 1) -> list[str]:
    return [problem for row in INPUTS[::every] if (problem := wrong(server, row))]


def warm_up(server: Server) -> None:
    """Let it start all the threads it will ever have, and fill its caches."""
    crowd = [threading.Thread(target=post, args=(server.port, GOOD)) for _ in range(16)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()


def test_there_are_many():
    assert len({row.name for row in INPUTS}) == len(INPUTS)
    assert sum(row.status != 200 for row in INPUTS) >= 80


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("whose", "first", "again"),
    [
        ("fake", 1, 12),
        ("server", 24, 24),
        pytest.param("fake", 1, 1, marks=pytest.mark.slow),
        pytest.param("server", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_every_bad_input_gets_its_answer_and_leaves_nothing_behind(
    request: pytest.FixtureRequest, whose: str, first: int, again: int
):
    """The first round warms caches and allocators, the second one is measured against it.

    Without a model all rows are judged, and some of them with it: half of them are answered, which
    takes the model a moment each.
    """
    server: Server = request.getfixturevalue(whose)
    said_before = server.log.stat().st_size
    warm_up(server)
    worker = Worker(server)
    assert everything(server, first) == []
    files, threads, before = worker.files, worker.threads, worker.megabytes
    assert everything(server, again) == []
    until(
        lambda: worker.files <= files and worker.threads <= threads,
        said=lambda: (worker.files, files, worker.threads, threads),
    )
    assert worker.megabytes - before < 50
    samples = send(server.port, "GET", "/metrics").body.decode()
    for held in (
        "num_requests_running",
        "num_requests_waiting",
        "batch_sequences",
        "batch_waiting",
    ):
        assert f"\nqwenvl_{held} 0.0\n" in samples
    answer = post(server.port, GOOD)
    said = "circle" if whose == "server" else "一个答案。"
    assert (answer.status, json.loads(answer.body)["result"]) == (200, said)
    assert server.worker == worker.pid
    log = server.log.read_bytes()[said_before:].decode(errors="replace")
    for line in log.splitlines():
        assert "Traceback" not in line
        assert " ERROR " not in line
        assert all(sign == "\t" or sign.isprintable() for sign in line), repr(line)
