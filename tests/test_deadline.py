from __future__ import annotations

import time

import pytest

from qwenvl_app.errors import ClientGone, DeadlineExceeded
from qwenvl_app.service.deadline import Caller


def test_wanted_until_the_deadline():
    caller = Caller(time.monotonic() + 20)
    assert caller.wants_answer
    assert 19 < caller.remaining <= 20
    caller.check()
    late = Caller(time.monotonic())
    assert (late.wants_answer, late.remaining) == (False, 0)
    with pytest.raises(DeadlineExceeded):
        late.check()


def test_leaving_calls_what_is_waiting_now_and_nothing_else():
    caller = Caller(time.monotonic() + 20)
    called: list[str] = []
    with caller.on_leaving(lambda: called.append("first")):
        pass
    with caller.on_leaving(lambda: called.append("second")):
        caller.leave()
    assert called == ["second"]
    assert caller.gone
    assert not caller.wants_answer
    with pytest.raises(ClientGone):
        caller.check()


def test_who_has_left_interrupts_at_once():
    """Between two stages nobody listens: the next one must not begin to wait."""
    caller = Caller(time.monotonic() + 20)
    caller.leave()
    called: list[str] = []
    with caller.on_leaving(lambda: called.append("at once")):
        assert called == ["at once"]
