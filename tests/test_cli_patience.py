"""When a batch asks again, and when it gives up: no time passes here but the one that is waited."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from qwenvl_app.cli import patience
from qwenvl_app.cli.answers import Answer, Broken, Failed, Refused
from qwenvl_app.cli.client import Client, Picture
from qwenvl_app.cli.patience import Patience

PICTURE = Picture(b"", "image/png")
DONE = Answer("done")


class Clock(threading.Event):
    """Waiting for it takes no time, and is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def now(self) -> float:
        return sum(self.waits)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0)
        return False


class Script(Client):
    """A server that does the given things in turn, the last one for ever."""

    def __init__(self, *turns: Answer | Exception, phase: str = ""):
        super().__init__("http://x", None, 1)
        self.turns, self.phase = list(turns), phase

    def ask(self, picture: Picture, prompt: str) -> Answer:
        turn = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        if isinstance(turn, Exception):
            raise turn
        return turn

    def status(self) -> tuple[str, str]:
        if not self.phase:
            raise Broken("away", sent=False)
        return self.phase, "the message"

    def slots(self) -> int:
        return 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=clock.now))
    return clock


def ask(server: Script, clock: Clock, seconds: float = 600) -> Answer:
    return Patience(server, seconds, clock).ask(PICTURE, "?")


@pytest.mark.parametrize("status", [429, 502, 503])
def test_what_a_busy_server_asks_for_is_waited(clock: Clock, status: int):
    busy = [Refused(status, "busy", seconds) for seconds in (7, 3, None, 10**6)]
    assert ask(Script(*busy, DONE), clock) == DONE
    bounds = ((7, 8.4), (3, 3.6), (0.5, 0.6), (120, 144))
    for waited, (least, most) in zip(clock.waits, bounds, strict=True):
        assert least <= waited <= most


def test_a_server_that_restarts_is_waited_for_longer_and_longer(clock: Clock):
    away = [Broken("connection refused", sent=False)] * 8
    assert ask(Script(Broken("reset"), *away, DONE), clock) == DONE
    assert clock.waits == sorted(clock.waits[:6]) + clock.waits[6:]
    assert clock.waits[0] < 1 < clock.waits[5]
    assert max(clock.waits) <= 18


@pytest.mark.parametrize(
    "error", [Broken("reset"), Broken("refused", sent=False), Refused(503, "busy", 5)]
)
def test_but_not_for_ever_and_then_no_picture_is_to_blame(clock: Clock, error: Exception):
    with pytest.raises(Failed, match=r"^no answer from http://x in 60 s: "):
        ask(Script(error), clock, 60)
    assert 60 < clock.now() < 90


def test_others_are_answered_but_this_one_is_not(clock: Clock):
    server = Script(Refused(503, "no memory", 5))
    waiting = Patience(server, 60, clock)
    wait = clock.wait

    def and_another_is_answered(timeout: float | None = None) -> bool:
        server.turns.insert(0, DONE)
        waiting.ask(PICTURE, "?")
        return wait(timeout)

    clock.wait = and_another_is_answered  # type: ignore[method-assign]
    with pytest.raises(Refused, match="no memory"):
        waiting.ask(PICTURE, "?")
    assert 60 < clock.now() < 90


def test_a_picture_that_breaks_a_running_server_is_given_up(clock: Clock):
    with pytest.raises(Broken, match="reset"):
        ask(Script(Broken("reset"), phase="ready"), clock)
    assert len(clock.waits) == 4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_picture_that_is_refused_is_not_asked_again(clock: Clock, status: int):
    with pytest.raises(Refused):
        ask(Script(Refused(status, "no")), clock)
    assert clock.waits == []


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_what_is_wrong_with_every_picture_ends_all(clock: Clock, status: int):
    with pytest.raises(Failed, match=f"http://x: {status}: no"):
        ask(Script(Refused(status, "no")), clock)
    assert clock.waits == []


@pytest.mark.parametrize("status", [408, 500, 504])
def test_what_failed_may_work_the_next_time(clock: Clock, status: int):
    assert ask(Script(Refused(status, "no"), Refused(status, "no"), DONE), clock) == DONE
    with pytest.raises(Refused):
        ask(Script(Refused(status, "no"), phase="ready"), clock)
    with pytest.raises(Failed, match="the message"):  # and so would every other picture
        ask(Script(Refused(status, "no"), phase="failed"), clock)


def test_a_server_that_loads_is_waited_for(clock: Clock):
    server = Script(DONE, phase="loading")
    wait = clock.wait

    def and_it_is_ready(timeout: float | None = None) -> bool:
        server.phase = "ready"
        return wait(timeout)

    clock.wait = and_it_is_ready  # type: ignore[method-assign]
    assert Patience(server, 600, clock).slots() == 3
    assert len(clock.waits) == 1
    with pytest.raises(Failed, match="no answer from http://x in 60 s: away"):
        Patience(Script(DONE), 60, clock).slots()
