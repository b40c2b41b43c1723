from __future__ import annotations

import time

import pytest

from qwenvl_app.errors import ClientGone, DeadlineExceeded
from qwenvl_app.service.deadline import Deadline


def test_wanted_until_the_deadline():
    deadline = Deadline(time.monotonic() + 20)
    assert deadline.wants_answer
    assert 19 < deadline.remaining <= 20
    deadline.check()
    late = Deadline(time.monotonic())
    assert (late.wants_answer, late.remaining) == (False, 0)
    with pytest.raises(DeadlineExceeded):
        late.check()


def test_leaving_calls_what_is_waiting_now_and_nothing_else():
    deadline = Deadline(time.monotonic() + 20)
    called: list[str] = []
    with deadline.on_leaving(lambda: called.append("first")):
        pass
    with deadline.on_leaving(lambda: called.append("second")):
        deadline.leave()
    assert called == ["second"]
    assert deadline.gone
    assert not deadline.wants_answer
    with pytest.raises(ClientGone):
        deadline.check()


def test_who_has_left_interrupts_at_once():
    """Between two stages nobody listens: the next one must not begin to wait."""
    deadline = Deadline(time.monotonic() + 20)
    deadline.leave()
    called: list[str] = []
    with deadline.on_leaving(lambda: called.append("at once")):
        assert called == ["at once"]
