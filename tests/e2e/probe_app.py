"""The service with a window into it: what a client can't see from outside. For tests only."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flask import Response, jsonify

from qwenvl_app import create_app
from qwenvl_app.engine.executor import Executor
from qwenvl_app.service import admission as admissions
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.deadline import Deadline

STEP_S = 0.02  # the embedded model would be done before anyone can leave

_last_step: dict[str, float] = {}  # request id: when a step last worked for it
_waits: list[float] = []  # seconds that each waited who got a permit
_granted: list[int] = []  # the queue's numbers, in the order in which they got their permits
_numbers = itertools.count()
_prefill, _admit = Executor.prefill, Admission.admit


def _slow(self, plan, rows):  # once a step, for all rows
    time.sleep(STEP_S)
    _last_step.update((row.request_id, time.monotonic()) for row in rows)
    return _prefill(self, plan, rows)


class NumberedTurn(admissions._Turn):
    """Made, and granted, under the lock of the queue: so the numbers are the queue's order."""

    def __init__(self, deadline: Deadline):
        self.number = next(_numbers)
        super().__init__(deadline)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "granted" and value:
            _granted.append(self.number)
        super().__setattr__(name, value)


@contextmanager
def _recorded(self: Admission, deadline: Deadline) -> Iterator[float]:
    with _admit(self, deadline) as waited:
        _waits.append(waited)
        yield waited


admissions._Turn = NumberedTurn  # type: ignore[misc]
Executor.prefill = _slow  # type: ignore[method-assign]
Admission.admit = _recorded  # type: ignore[method-assign]
app = create_app()


@app.get("/debug")
def debug() -> Response:
    """Everything that must be as it was when nobody asks any more, and what was recorded."""
    parts = app.extensions["qwenvl"]
    engine, admission = parts["backend"]._engine, parts["admission"]
    return jsonify(
        idle={
            "taken": admission.permits - admission.free,
            "waiting": admission.waiting,
            "watched": parts["disconnects"].watched,
            "running": engine.running,
            "queued": engine.waiting,
        },
        threads=sorted(
            thread.name
            for thread in threading.enumerate()
            if not thread.name.startswith("ThreadPoolExecutor")  # gunicorn's, made as needed
        ),
        files=len(list(Path("/proc/self/fd").iterdir())),
        last_step=_last_step,
        waits=_waits,
        granted=_granted,
    )
