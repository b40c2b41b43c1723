"""Several workers, which ``backend = "remote"`` allows: one service all the same."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.server import FAKE, Server
from tests.framing import form, length
from tests.test_metrics import Samples, parse
from tests.waiting import until
from tests.wire import GOOD, post, receive, send

REMOTE = {
    "QWENVL_BACKEND": "remote",
    "QWENVL_REMOTE_URL": "http://127.0.0.1:9",  # nobody: the backend is scripted
    "QWENVL_REMOTE_MODEL": "demo",
    "QWENVL_WORKERS": "2",
}
LIMIT = 4
ASK = form(b"Authorization: Bearer secret", length(len(GOOD)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers, whose answers are held while the file ``hold`` is there."""
    folder = tmp_path_factory.mktemp("two")
    settings = REMOTE | {
        "QWENVL_API_KEYS": "team:secret",
        "QWENVL_MAX_REQUESTS_PER_KEY": str(LIMIT),
        "QWENVL_MAX_CONCURRENCY": "17",
        "FAKE_HOLD": str(folder / "hold"),
    }
    with Server(folder / "log", FAKE, **settings) as server:
        server.wait()
        until(lambda: scraped(server)["qwenvl_batch_slots"] == 0)  # a scripted backend has none
        until(lambda: len(server.workers) == 2)
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def scraped(server: Server) -> Samples:
    return parse(send(server.port, "GET", "/metrics").body.decode())


def asked(server: Server, held: ExitStack, count: int) -> list[socket.socket]:
    """So many requests under way, each on a connection of its own."""
    address = ("127.0.0.1", server.port)
    connections = [held.enter_context(socket.create_connection(address, 20)) for _ in range(count)]
    for connection in connections:
        connection.sendall(ASK)
    return connections


def status(connection: socket.socket) -> int:
    answer = receive(connection)
    assert answer
    return answer.status


def running(server: Server) -> float:
    return scraped(server)["qwenvl_num_requests_running"]


def test_metrics_are_those_of_all(two: Server):
    """Whoever of them is asked: 20 answers, on connections of their own, are 20."""
    name = 'qwenvl_request_success_total{finished_reason="stop"}'
    before = scraped(two)[name]
    with ExitStack() as held:
        for _ in range(20):
            (connection,) = asked(two, held, 1)
            assert status(connection) == 200
    for _ in range(6):
        assert scraped(two)[name] == before + 20
    samples = scraped(two)
    resident = [rss(pid) for pid in two.workers]
    assert samples["process_resident_memory_bytes"] > 1.5 * max(resident)
    assert samples['qwenvl_phase{phase="ready"}'] == 1


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_keys_limit_holds_for_all_and_a_dead_worker_holds_nothing(two: Server):
    hold = two.log.parent / "hold"
    with ExitStack() as held:
        hold.touch()
        try:
            first = asked(two, held, LIMIT)
            until(lambda: running(two) == LIMIT)
            assert {status(each) for each in asked(two, held, 6)} == {429}
            victims = two.workers
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            until(lambda: len(two.workers) == 2 and not set(victims) & set(two.workers))
            two.wait()
            until(lambda: running(two) == 0)
            for connection in first:
                connection.close()
            again = asked(two, held, LIMIT)
            until(lambda: running(two) == LIMIT)
        finally:
            hold.unlink()
        assert {status(each) for each in again} == {200}


def test_a_reload_refuses_nobody_and_counts_on(two: Server):
    before = scraped(two)["qwenvl_generation_tokens_total"]
    workers, answers = set(two.workers), []
    with ThreadPoolExecutor(4) as pool:
        two.process.send_signal(signal.SIGHUP)
        while not (len(two.workers) == 2 and workers.isdisjoint(two.workers)):
            with ExitStack() as held:
                connections = asked(two, held, 3)
                answers += pool.map(status, connections)
    assert set(answers) == {200}
    assert scraped(two)["qwenvl_generation_tokens_total"] == before + 2 * len(answers)


def test_each_has_a_cpu_if_there_are_enough_of_them(two: Server):
    """After the reload too, when the new ones came while the old ones had theirs."""
    until(lambda: len(two.workers) == 2)
    cpus, had = os.sched_getaffinity(0), [os.sched_getaffinity(pid) for pid in two.workers]
    if len(cpus) > len(had):
        assert had == [cpus, cpus]
    else:
        assert [len(each) for each in had] == [1, 1]
        assert set.union(*had) == cpus


def test_their_number_is_a_setting(two: Server):
    """SIGTTIN would add one that has a share of its own."""
    workers = two.workers
    two.process.send_signal(signal.SIGTTIN)
    until(lambda: "the number of workers is a setting" in two.log.read_text())
    assert two.workers == workers


def directory(server: Server) -> Path:
    """What the workers share, which is gone with them."""
    found: list[str] = []

    def mapped() -> bool:  # a worker that is still loading has not got it yet
        maps = Path(f"/proc/{server.workers[0]}/maps").read_text()
        found.extend(re.findall(r"(/\S+/qwenvl-\w+)/counter", maps))
        return bool(found)

    until(mapped)
    assert Path(found[0]).is_dir()
    return Path(found[0])


def test_who_comes_while_one_still_answers_is_told(tmp_path: Path):
    """The other worker has nothing to do and ends first; it must not shut the door for both."""
    hold = tmp_path / "hold"
    with Server(tmp_path / "log", FAKE, **REMOTE, FAKE_HOLD=str(hold)) as server:
        server.wait()
        until(lambda: len(server.workers) == 2)
        with ExitStack() as held:
            hold.touch()
            last = held.enter_context(socket.create_connection(("127.0.0.1", server.port), 20))
            last.sendall(ASK)
            until(lambda: running(server) == 1)
            shared = directory(server)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: len(server.workers) == 1)
            assert post(server.port, GOOD).status == 503
            hold.unlink()
            assert status(last) == 200
        assert server.process.wait(20) == 0
    assert not shared.exists()
