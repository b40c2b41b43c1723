"""Telling systemd how it goes: the phase, READY once it is one, and a sign of life.

gunicorn would say READY before its worker has begun to load, and never that the model fails. Here
the state of the backend decides: a sign of life is sent while it is not FAILED, so that a process
in which no thread gets to run is restarted, and so is one whose model will not work again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from qwenvl_app.generation import Phase, Status

PERIOD_S = 1.0


def start(status: Callable[[], Status], send: Callable[[str], None]) -> None:
    """Watch ``status`` on a thread of its own, to the process's end; ``send`` is sd_notify."""
    threading.Thread(target=_watch, args=(status, send), name="notify", daemon=True).start()


def _watch(status: Callable[[], Status], send: Callable[[str], None]) -> None:
    before: Status | None = None
    while True:
        if told := messages(now := status(), before):
            send("\n".join(told))
        before = now
        time.sleep(PERIOD_S)


def messages(now: Status, before: Status | None) -> list[str]:
    """What systemd is told of ``now``, when it was last told of ``before``.

    Its age is not: systemd would have to be told, and to tell its listeners, every second.
    """
    told = []
    if before is None or (now.phase, now.message) != (before.phase, before.message):
        told.append(f"STATUS={now.phase}: {now.message}".replace("\n", " "))
    new = before is None or now.phase is not before.phase
    if now.phase is Phase.FAILED:
        # The unit's watchdog acts: what failed for good is no better after a while.
        return [*told, "WATCHDOG=trigger"] if new else told
    if new:
        told += {Phase.READY: ["READY=1"], Phase.DRAINING: ["STOPPING=1"]}.get(now.phase, [])
    return [*told, "WATCHDOG=1"]
