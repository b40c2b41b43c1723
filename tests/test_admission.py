from __future__ import annotations

import threading
import time

import pytest

from qwenvl_app.admission import Admission
from qwenvl_app.errors import Unavailable


def test_a_free_permit_costs_no_wait():
    admission = Admission(2, 0, 1)
    with admission.admit() as waited:
        assert waited == 0
        assert admission.free == 1
    assert admission.free == 2


def test_nobody_waits_longer_than_the_bound():
    admission = Admission(1, 5, 0.05)
    with admission.admit():
        began = time.monotonic()
        with pytest.raises(Unavailable) as refused, admission.admit():
            pass
        assert 0.04 < time.monotonic() - began < 5
        assert refused.value.retry_after == 1
        assert admission.waiting == 0
    assert admission.free == 1


def test_first_come_first_served():
    admission = Admission(1, 50, 10)
    order: list[int] = []

    def wait(number: int) -> None:
        with admission.admit():
            order.append(number)

    threads = []
    with admission.admit():
        for number in range(20):
            thread = threading.Thread(target=wait, args=(number,))
            thread.start()
            threads.append(thread)
            while admission.waiting <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert admission.free == 1


def test_permits_add_up_under_contention():
    """Time-outs and hand-overs race here: none may lose a permit or make one."""
    admission = Admission(3, 40, 0.002)
    holders, most = [0], [0]
    lock = threading.Lock()

    def work() -> None:
        for _ in range(50):
            try:
                with admission.admit():
                    with lock:
                        holders[0] += 1
                        most[0] = max(most[0], holders[0])
                    time.sleep(0.001)
                    with lock:
                        holders[0] -= 1
            except Unavailable:
                pass

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 3
    assert (admission.free, admission.waiting) == (3, 0)
