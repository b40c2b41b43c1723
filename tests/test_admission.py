from __future__ import annotations

import random
import threading
import time

import pytest

from qwenvl_app.errors import ClientGone, DeadlineExceeded, ServiceError, Unavailable
from qwenvl_app.generation import Phase
from qwenvl_app.service.admission import Admission
from qwenvl_app.service.deadline import Deadline
from tests.waiting import until


def deadline(seconds: float = 20) -> Deadline:
    return Deadline(time.monotonic() + seconds)


class Waiter(threading.Thread):
    """Asks for a permit, holds it while ``hold`` is not set, and tells how it went."""

    def __init__(self, admission: Admission, who: Deadline | None = None):
        super().__init__()
        self.admission, self.deadline = admission, who or deadline()
        self.hold = threading.Event()
        self.entered = threading.Event()
        self.error: ServiceError | None = None
        before = admission.waiting
        self.start()
        until(lambda: self.entered.is_set() or self.error or admission.waiting > before)

    def run(self) -> None:
        try:
            with self.admission.admit(self.deadline):
                self.entered.set()
                assert self.hold.wait(20)
        except ServiceError as error:
            self.error = error

    def end(self) -> ServiceError | None:
        self.hold.set()
        self.join(20)
        assert not self.is_alive()
        return self.error


def test_a_free_permit_costs_no_wait():
    admission = Admission(2, 0, 1)
    with admission.admit(deadline()) as waited:
        assert waited == 0
        assert admission.free == 1
    assert admission.free == 2


def test_nobody_waits_longer_than_the_bound():
    admission = Admission(1, 5, 0.05)
    with admission.admit(deadline()):
        began = time.monotonic()
        with pytest.raises(Unavailable), admission.admit(deadline()):
            pass
        assert 0.04 < time.monotonic() - began < 5
        assert admission.waiting == 0
    assert admission.free == 1


def test_nobody_waits_beyond_the_deadline():
    admission = Admission(1, 5, 20)
    with admission.admit(deadline()):
        with pytest.raises(DeadlineExceeded), admission.admit(deadline(0.05)):
            pass
        assert admission.waiting == 0
    with pytest.raises(DeadlineExceeded), admission.admit(deadline(-1)):
        pass
    assert admission.free == 1


def test_first_come_first_served():
    admission = Admission(1, 50, 10)
    order: list[int] = []

    def wait(number: int) -> None:
        with admission.admit(deadline()):
            order.append(number)

    threads = []
    with admission.admit(deadline()):
        for number in range(20):
            thread = threading.Thread(target=wait, args=(number,))
            thread.start()
            threads.append(thread)
            until(lambda number=number: admission.waiting > number)
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert admission.free == 1


def test_who_leaves_the_queue_makes_room_in_it_at_once():
    """A client that closed its connection kept its place until its turn came."""
    admission = Admission(1, 2, 20)
    holder, first, second = (Waiter(admission) for _ in range(3))
    with pytest.raises(Unavailable), admission.admit(deadline()):
        pass
    first.deadline.leave()
    assert admission.waiting == 1
    assert isinstance(first.end(), ClientGone)
    third = Waiter(admission)
    assert admission.waiting == 2
    assert holder.end() is None
    assert second.end() is None
    assert third.end() is None
    assert not first.entered.is_set()
    assert (admission.free, admission.waiting) == (1, 0)


def test_who_has_left_before_gets_no_place():
    admission = Admission(1, 2, 20)
    gone = deadline()
    gone.leave()
    with pytest.raises(ClientGone), admission.admit(gone):
        pass
    with admission.admit(deadline()), pytest.raises(ClientGone), admission.admit(gone):
        pass
    assert (admission.free, admission.waiting) == (1, 0)


def test_a_permit_is_not_handed_to_who_does_not_want_it_any_more():
    """The next one gets it, though the thread of the one before has not woken up yet."""
    admission = Admission(1, 5, 20)
    holder, late, next_ = Waiter(admission), Waiter(admission), Waiter(admission)
    late.deadline.at = 0.0
    assert holder.end() is None
    assert next_.entered.wait(10)
    assert next_.end() is None
    assert isinstance(late.end(), DeadlineExceeded)
    assert not late.entered.is_set()
    assert (admission.free, admission.waiting) == (1, 0)


def test_draining():
    """Those who wait are told at once, not when their time-out ends."""
    admission = Admission(1, 5, 20)
    holder, *waiting = (Waiter(admission) for _ in range(4))
    assert admission.draining is None
    admission.drain()
    first = admission.draining
    assert first is not None
    assert first.phase is Phase.DRAINING
    for waiter in waiting:
        waiter.join(5)
        assert isinstance(waiter.error, Unavailable)
        assert waiter.error.detail == "服务正在停止，请稍后重试。"
    assert not holder.hold.is_set()  # it goes on
    admission.drain()
    assert admission.draining is first
    assert holder.end() is None
    with pytest.raises(Unavailable) as refused, admission.admit(deadline()):
        pass
    assert refused.value.detail == "服务正在停止，请稍后重试。"
    assert (admission.free, admission.waiting) == (1, 0)


def retry_after(admission: Admission) -> int | None:
    with pytest.raises(Unavailable) as refused, admission.admit(deadline()):
        pass
    return refused.value.retry_after


def test_retry_after_is_what_the_queue_will_take(monkeypatch):
    """It was a fourth of the time-out, whatever the load was."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    admission = Admission(2, 0, 20)

    def hold(seconds: float) -> None:
        with admission.admit(Deadline(1e9)):
            now[0] += seconds

    with admission.admit(Deadline(1e9)), admission.admit(Deadline(1e9)):
        assert retry_after(admission) == 3  # two permits, and a guess of 5 s
    for _ in range(100):
        hold(12)
    with admission.admit(Deadline(1e9)), admission.admit(Deadline(1e9)):
        assert retry_after(admission) == 6
    for _ in range(100):
        hold(12)
    for _ in range(100):  # damaged pictures: given back at once, and no answer
        with pytest.raises(ValueError, match="damaged"), admission.admit(Deadline(1e9)):
            raise ValueError("damaged")
    with admission.admit(Deadline(1e9)), admission.admit(Deadline(1e9)):
        assert retry_after(admission) == 6
    for _ in range(100):
        hold(0.01)
    with admission.admit(Deadline(1e9)), admission.admit(Deadline(1e9)):
        assert retry_after(admission) == 1
    for _ in range(100):
        hold(1000)
    with admission.admit(Deadline(1e9)), admission.admit(Deadline(1e9)):
        assert retry_after(admission) == 60


def test_permits_add_up_under_contention():
    """Time-outs, departures and hand-overs race here: none may lose a permit or make one."""
    admission = Admission(3, 10, 0.002)
    holders, most = [0], [0]
    lock = threading.Lock()

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(50):
            who = deadline(rng.choice((0.001, 20)))
            leave = threading.Timer(rng.random() * 0.003, who.leave)
            if rng.random() < 0.3:
                leave.start()
            try:
                with admission.admit(who):
                    with lock:
                        holders[0] += 1
                        most[0] = max(most[0], holders[0])
                    time.sleep(0.001)
                    with lock:
                        holders[0] -= 1
            except (Unavailable, ClientGone, DeadlineExceeded):
                pass
            if leave.is_alive():
                leave.join()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 3
    assert (admission.free, admission.waiting) == (3, 0)
