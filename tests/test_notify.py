from __future__ import annotations

import time

import pytest

from qwenvl_app.generation import Phase, Status
from qwenvl_app.notify import messages


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
    status = Status(phase, "a sentence\nof two lines", time.monotonic() - 12)
    told = messages(status, before)
    assert told == [f"STATUS={phase} for 12 s: a sentence of two lines", *expected]
