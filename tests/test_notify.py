from __future__ import annotations

import time

import pytest

from qwenvl_app.generation import Phase, Status
from qwenvl_app.server.notify import messages


@pytest.mark.parametrize(
    ("phase", "before", "expected"),
    [
        (Phase.LOADING, None, ["WATCHDOG=1"]),
        (Phase.READY, Phase.LOADING, ["READY=1", "WATCHDOG=1"]),
        (Phase.READY, None, ["READY=1", "WATCHDOG=1"]),
        (Phase.READY, Phase.READY, ["WATCHDOG=1"]),
        (Phase.DRAINING, Phase.READY, ["STOPPING=1", "WATCHDOG=1"]),
        (Phase.DRAINING, Phase.DRAINING, ["WATCHDOG=1"]),
        (Phase.FAILED, Phase.READY, ["WATCHDOG=trigger"]),
        (Phase.FAILED, Phase.LOADING, ["WATCHDOG=trigger"]),
        (Phase.FAILED, Phase.FAILED, []),
    ],
)
def test_what_systemd_is_told(phase: Phase, before: Phase | None, expected: list[str]):
    """READY once, STOPPING once; a service that has failed for good gives no sign of life."""
    since = time.monotonic()
    last = before and Status(before, "a sentence\nof two lines", since)
    told = messages(Status(phase, "a sentence\nof two lines", since), last)
    status = [] if phase is before else [f"STATUS={phase}: a sentence of two lines"]
    assert told == [*status, *expected]


def test_a_status_is_told_once():
    """It had its age in it, so that systemd and who listens to it heard a new one every second."""
    first = Status(Phase.LOADING, "loading the weights: 1 of 2", time.monotonic() - 12)
    assert messages(first, None)[0] == "STATUS=loading: loading the weights: 1 of 2"
    assert messages(first, first) == ["WATCHDOG=1"]
    second = Status(Phase.LOADING, "loading the weights: 2 of 2", first.since)
    assert messages(second, first) == ["STATUS=loading: loading the weights: 2 of 2", "WATCHDOG=1"]
